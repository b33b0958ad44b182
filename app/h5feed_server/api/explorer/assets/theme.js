// Before anything is drawn: the theme that was chosen, where it is not the system's.
"use strict"
try {
  const theme = localStorage.getItem("h5feed-theme")
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme
} catch { /* no storage: the system's theme */ }
