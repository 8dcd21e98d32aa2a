/* A page read from disk may not start a worker, which Material's search asks for: here its script runs in a
   hidden frame instead. Anywhere else nothing is changed. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = this.onerror = null
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.title = "search"
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow, outside = this
      this.waiting = []
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        outside.dispatchEvent(event)
        outside.onmessage?.(event)
      }
      inside.importScripts = (...urls) =>
        urls.reduce((before, each) => before.then(() => outside.load(each)), Promise.resolve())
      this.load(url).then(() => {
        this.ready = true
        this.waiting.splice(0).forEach(data => this.postMessage(data))
      })
    }
    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.frame.contentDocument.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = () => reject(new Error(`${url} cannot be read`))
        this.frame.contentDocument.body.appendChild(script)
      })
    }
    postMessage(data) {
      if (!this.ready) this.waiting.push(data)
      else this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data }))
    }
    terminate() { this.frame.remove() }
  }
}
