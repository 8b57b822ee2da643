// A page from the disk may start no worker, and the theme's search runs in one. Here a hidden frame stands in for it,
// under the name by which the theme's worker knows that it runs in a frame.
if (location.protocol === "file:") {
  const inside = `
    postMessage = data => parent.postMessage(data, "*");
    importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise((done, failed) => {
      const script = document.createElement("script");
      Object.assign(script, {src: url, onload: done, onerror: failed});
      document.body.append(script);
    })), Promise.resolve());`;
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise(ready => addEventListener("DOMContentLoaded", ready, {once: true}));
      if (document.body) this.ready = Promise.resolve();
      this.ready = this.ready.then(() => new Promise(loaded => {
        document.body.append(frame);
        const page = frame.contentDocument;
        page.open();
        page.write(`<body><script>${inside}<\/script></body>`);
        page.close();
        const worker = page.createElement("script");
        Object.assign(worker, {src: url, onload: loaded});
        page.body.append(worker);
      }));
      addEventListener("message", event => {
        if (event.source !== frame.contentWindow) return;
        this.dispatchEvent(new MessageEvent("message", {data: event.data}));
      });
      this.frame = frame;
    }
    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", {data})));
    }
    terminate() {
      this.frame.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
