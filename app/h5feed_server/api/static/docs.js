// The page of the OpenAPI description: Swagger UI with what it lacks for data.
//
// - Datasets, splits and fields are chosen from those that are there.
// - Parameters stand in groups, below headings.
// - Pictures are shown, and files get names that tell what they hold.
"use strict"

const NAMES_LISTED = 500 // As many as the description has at most: beyond, names are typed in.

// What a parameter is chosen from, and which fields suit it.
const anyField = () => true
const isImage = (field) => field.channels !== null && !field.ragged
const isScalar = (field) => field.shape.length === 0 && !field.ragged
const OFFERED = {
  field: anyField, fields: anyField, classes: isScalar, stratify: anyField, group: isScalar, weights: isScalar,
  encoded: (field) => field.decode !== null,
}
const LISTS = new Set(["fields", "encoded"]) // Several, divided by commas.
const OF_IMAGES = /\/(image|preview|mean-image)$/ // Paths of endpoints that show nothing else.
const SPLITS = ["all", "train", "val", "test"]

let token = null
let described = new Map() // By name of the dataset: a promise of what the server says of it.

function describe(name) {
  if (!described.has(name)) {
    const headers = token === null ? {} : { Authorization: `Bearer ${token}` }
    const answer = fetch(`v1/datasets/${encodeURIComponent(name)}`, { headers })
    described.set(name, answer.then((response) => (response.ok ? response.json() : null)).catch(() => null))
  }
  return described.get(name)
}

// Values to choose from for a parameter; null: it is typed in.
function choices(parameter, path, dataset, names) {
  if (parameter === "name") return names.length > 0 && names.length < NAMES_LISTED ? names : null
  if (dataset === null) return null
  if (parameter === "split") return [...new Set([...SPLITS, ...dataset.native_splits.map((split) => split.name)])]
  const suits = OFFERED[parameter]
  if (suits === undefined) return null
  const wanted = parameter === "field" && OF_IMAGES.test(path) ? isImage : suits
  const fields = dataset.fields.filter((field) => field.readable && wanted(field)).map((field) => field.name)
  if (parameter === "stratify") fields.unshift("none")
  return fields.length > 0 ? fields : null
}

function fileName(url, contentType) {
  const known = { "image/png": "png", "image/svg+xml": "svg", "application/x-npz": "npz", "application/x-npy": "npy" }
  const place = decodeURIComponent(new URL(url, location.href).pathname).replace(/^.*?\/v1\/datasets\//, "")
  const stem = place.replaceAll("/", "-").replace(/[^\w.-]+/g, "_")
  return `${stem}.${known[contentType.split(";")[0]] ?? "safetensors"}`
}

// Programs take tensors; people look first at what they can read. Names are offered in a list of our own.
function arranged(description) {
  for (const operations of Object.values(description.paths ?? {})) {
    for (const operation of Object.values(operations)) {
      const answer = operation.responses["200"]
      const readable = answer?.content?.["application/json"]
      if (readable) answer.content = { "application/json": readable, ...answer.content }
      for (const parameter of operation.parameters ?? []) {
        if (parameter.examples === undefined) continue
        parameter["x-names"] = Object.keys(parameter.examples)
        parameter.example = parameter["x-names"][0]
        delete parameter.examples
      }
    }
  }
  return description
}

// The description names the datasets to those who have a token: it is fetched anew when one is given or taken back.
function fetchWith(tokenOf) {
  return (original, system) => (payload) => {
    const result = original(payload)
    token = tokenOf(payload)
    described = new Map()
    system.specActions.download("openapi.json")
    return result
  }
}

// Opens the endpoint that a link names: Swagger UI itself takes the `_` of its name for a blank, and complains.
function openLinked(original, { layoutActions }) {
  return (hash) => {
    const [tag, operation] = hash.replace(/^#!?\/?/, "").split("/")
    if (!operation) return original(hash)
    layoutActions.show(["operations-tag", tag], true)
    const shown = ["operations", tag, operation]
    layoutActions.show(shown, true)
    layoutActions.scrollTo(shown)
    layoutActions.scrollToVirtualizedOperation(shown)
  }
}

function dataPlugin({ React }) {
  const { createContext, createElement, useContext, useEffect, useMemo, useState } = React
  const Choices = createContext(null)

  // What the server says of a dataset; null until it has.
  function useDataset(name) {
    const [known, setKnown] = useState(null)
    useEffect(() => {
      let isWanted = true
      if (name) describe(name).then((dataset) => isWanted && setKnown(dataset))
      return () => { isWanted = false }
    }, [name, token])
    return known !== null && known.name === name ? known : null
  }

  function withChoices(Row, system) {
    return (props) => {
      const { rawParam, pathMethod } = props
      // Swagger UI complains of a parameter that the endpoint does not have.
      const isNamed = pathMethod[0].includes("{name}")
      const chosen = isNamed ? system.specSelectors.parameterWithMeta(pathMethod, "name", "path")?.get("value") : undefined
      const dataset = useDataset(chosen)
      const heading = rawParam.get("x-heading")
      const above = heading && createElement("tr", { className: "heading" }, createElement("th", { colSpan: 2 }, heading))
      const names = rawParam.get("x-names")?.toArray() ?? []
      const parameter = rawParam.get("name")
      const offered = {
        parameter,
        values: choices(parameter, pathMethod[0], dataset, names),
        hint: rawParam.getIn(["schema", "examples", 0]),
      }
      return createElement(Choices.Provider, { value: offered }, above, createElement(Row, props))
    }
  }

  function withList(Input) {
    return (props) => {
      const offered = useContext(Choices)
      if (offered === null || offered.parameter !== props.description) return createElement(Input, props)
      if (offered.values === null) {
        const description = offered.hint === undefined ? "" : `for example ${offered.hint}`
        return createElement(Input, { ...props, description })
      }
      return createElement(Offered, { ...props, ...offered })
    }
  }

  function Offered({ parameter, values, value, required, disabled, onChange }) {
    const several = LISTS.has(parameter)
    const chosen = several ? (value || "").split(",").filter(Boolean).map(decodeURIComponent) : value || ""
    const isThere = several ? chosen.every((one) => values.includes(one)) : chosen === "" || values.includes(chosen)
    // What another dataset has is not kept.
    useEffect(() => {
      if (!isThere) onChange(required && values.length ? values[0] : "")
    }, [isThere])
    const change = ({ target }) => {
      const picked = [...target.selectedOptions].map((option) => option.value)
      onChange(several ? picked.map(encodeURIComponent).join(",") : target.value)
    }
    const options = values.map((one) => createElement("option", { key: one, value: one }, one))
    if (!several && !required) options.unshift(createElement("option", { key: "", value: "" }, "–"))
    const size = several ? Math.min(4, values.length) : undefined
    const about = { className: "offered", multiple: several, size, value: chosen, disabled, onChange: change }
    return createElement("select", { ...about, "aria-label": parameter }, options)
  }

  function withFiles(Body) {
    return (props) => {
      const { content, contentType = "", headers = {}, url } = props
      if (contentType.startsWith("image/")) return createElement(Picture, { content, contentType, url })
      if (!/attachment/.test(headers["content-disposition"])) return createElement(Body, props)
      const disposition = `attachment; filename="${fileName(url, contentType)}"`
      return createElement(Body, { ...props, headers: { ...headers, "content-disposition": disposition } })
    }
  }

  function Picture({ content, contentType, url }) {
    const source = useMemo(() => URL.createObjectURL(new Blob([content], { type: contentType })), [content])
    useEffect(() => () => URL.revokeObjectURL(source), [source])
    const name = fileName(url, contentType)
    return createElement("figure", { className: "picture" },
      createElement("h5", null, "Response body"),
      createElement("img", { src: source, alt: name }),
      createElement("figcaption", null, createElement("a", { href: source, download: name }, `Download ${name}`)))
  }

  return {
    wrapComponents: { parameterRow: withChoices, JsonSchema_string: withList, responseBody: withFiles },
    statePlugins: {
      spec: { wrapActions: { updateJsonSpec: (original) => (description) => original(arranged(description)) } },
      layout: { wrapActions: { parseDeepLinkHash: openLinked } },
      auth: {
        wrapActions: {
          authorize: fetchWith((payload) => Object.values(payload)[0].value),
          logout: fetchWith(() => null),
        },
      },
    },
  }
}

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  layout: "BaseLayout",
  deepLinking: true,
  showCommonExtensions: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  docExpansion: "list",
  presets: [SwaggerUIBundle.presets.apis],
  plugins: [dataPlugin],
  requestInterceptor: (request) => {
    if (request.loadSpec && token !== null) request.headers.Authorization = `Bearer ${token}`
    // Until somebody picks a type, what can be read is preferred, as the list of types says.
    if (request.headers.accept === "*/*") request.headers.accept = "application/json, */*;q=0.5"
    return request
  },
})
