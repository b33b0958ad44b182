// The pages work without this: it saves clicks and whole loads.
"use strict"

const THEMES = ["system", "light", "dark"]

function showTheme(button, theme) {
  button.textContent = { system: "◐", light: "☀", dark: "☾" }[theme]
  button.title = `Theme: ${theme}`
  button.setAttribute("aria-label", button.title)
  if (theme === "system") delete document.documentElement.dataset.theme
  else document.documentElement.dataset.theme = theme
}

function offerThemes() {
  const button = document.getElementById("theme")
  let theme = document.documentElement.dataset.theme || "system"
  showTheme(button, theme)
  button.hidden = false
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]
    showTheme(button, theme)
    try { localStorage.setItem("h5feed-theme", theme) } catch { /* for this page only */ }
  })
}

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text)
  // Over plain http, browsers offer nothing else.
  const area = document.createElement("textarea")
  area.value = text
  document.body.append(area)
  area.select()
  document.execCommand("copy")
  area.remove()
}

function offerCopies(root) {
  for (const button of root.querySelectorAll("button.copy")) {
    button.hidden = false
    button.addEventListener("click", async () => {
      await copy(button.closest(".snippet").querySelector("code").textContent)
      button.textContent = "Copied"
      setTimeout(() => { button.textContent = "Copy" }, 1500)
    })
  }
}

async function load(url) {
  const answer = await fetch(url, { headers: { accept: "text/html" } })
  return new DOMParser().parseFromString(await answer.text(), "text/html")
}

function swap(selector, loaded) {
  const old = document.querySelector(selector)
  const fresh = loaded.querySelector(selector)
  if (!old || !fresh) return
  const open = [...old.querySelectorAll("details")].map((one) => one.open)
  old.replaceWith(fresh)
  fresh.querySelectorAll("details").forEach((one, place) => { one.open = open[place] || one.open })
  offerCopies(fresh)
  begin(fresh)
}

// A page that waits for a job, or shows what happens now, is loaded again: but not below the reader's hands.
function reloadSoon(main) {
  const seconds = Number(main.dataset.reload)
  if (!seconds) return
  setTimeout(async () => {
    const busy = document.hidden || main.contains(document.activeElement) || String(getSelection())
    if (busy) return reloadSoon(main)
    try {
      const loaded = await load(location.href)
      swap("main", loaded)
      reloadSoon(document.querySelector("main"))
    } catch { reloadSoon(main) }
  }, 1000 * seconds)
}

// Splits are counted while they are being typed.
function countLive(form) {
  let timer = 0
  let last = ""
  const count = async () => {
    const query = new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""))
    const url = `${form.action}?${query}`
    if (url === last) return
    last = url
    const loaded = await load(url)
    if (url !== last) return
    swap("#result", loaded)
    swap("section.code", loaded)
    history.replaceState(null, "", url)
  }
  form.addEventListener("input", () => {
    clearTimeout(timer)
    timer = setTimeout(() => count().catch(() => {}), 300)
  })
}

// The column that rows are sorted by may lie beyond the edge of a wide table.
function showSorted(table) {
  const column = table.querySelector("th[aria-sort]")
  if (!column) return
  const box = table.parentElement.getBoundingClientRect()
  const ids = table.querySelector("th.id").getBoundingClientRect()
  const there = column.getBoundingClientRect()
  if (there.right > box.right) table.parentElement.scrollLeft += there.left - ids.right
}

function begin(root) {
  for (const form of root.querySelectorAll("form[data-live]")) countLive(form)
  for (const select of root.querySelectorAll("select[data-submit]")) {
    select.addEventListener("change", () => select.form.requestSubmit())
  }
  // An empty field of a form says nothing: it is left out of the URL.
  for (const form of root.querySelectorAll("form[method=get]")) {
    form.addEventListener("submit", () => {
      for (const field of form.elements) {
        if (field.name && (field.value === "" || (field.name === "offset" && field.value === "0"))) field.disabled = true
      }
      setTimeout(() => { for (const field of form.elements) field.disabled = false })
    })
  }
}

// Arrows lead from row to row, and from page to page.
function followArrows(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea, .scroll, pre")) return
  const where = { ArrowLeft: "prev", ArrowRight: "next" }[event.key]
  const link = where && document.querySelector(`main a[rel=${where}]`)
  if (link) link.click()
}

offerThemes()
offerCopies(document)
document.querySelectorAll("table.rows").forEach(showSorted)
begin(document)
reloadSoon(document.querySelector("main"))
document.addEventListener("keydown", followArrows)
