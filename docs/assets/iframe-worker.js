// Browsers start no worker from a file:// address, and the search of the site is one.
// Run its script in a hidden frame instead, so that the site can be searched from a folder.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const url = new URL(address, location.href);
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      this.onmessage = null;
      const receive = (data) => {
        const event = new MessageEvent("message", { data });
        this.dispatchEvent(event);
        if (this.onmessage) this.onmessage(event);
      };
      inner.postMessage = receive;
      inner.importScripts = (...names) =>
        Promise.all(
          names.map(
            (name) =>
              new Promise((resolve, reject) => {
                const script = inner.document.createElement("script");
                script.src = new URL(name, url).href;
                script.onload = resolve;
                script.onerror = reject;
                inner.document.body.append(script);
              }),
          ),
        );
      this.frame = frame;
      this.ready = inner.importScripts(url.href);
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
