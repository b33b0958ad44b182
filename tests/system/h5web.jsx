// h5web as an application embeds it: `?file=` names the file, relative to the data folder.
import { App, H5GroveProvider } from "@h5web/app"
import "@h5web/app/styles.css"
import { createRoot } from "react-dom/client"

const file = new URLSearchParams(location.search).get("file")

createRoot(document.getElementById("root")).render(
  <H5GroveProvider url={`${location.origin}/h5grove`} filepath={file}>
    <App />
  </H5GroveProvider>,
)
