// What a reader of this page would miss; headless.py has the words.
(() => {
  const wide = innerWidth + 1, seen = e => e.getClientRects().length && getComputedStyle(e).visibility !== "hidden";
  const inside = e => { for (let p = e.parentElement; p; p = p.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return true; return false; };
  const name = e => e.tagName + (e.id ? "#" + e.id : "") + (e.className ? "." + e.className : "");
  const all = [...document.body.querySelectorAll("*")].filter(e => seen(e) && !e.closest("script, style, dialog:not([open])"));
  const cut = all.filter(e => !inside(e) && e.getBoundingClientRect().right > wide).map(name);
  const scrolled = all.filter(e => e.scrollWidth > e.clientWidth + 1
    && ["auto", "scroll", "hidden"].includes(getComputedStyle(e).overflowX)).map(name);
  const colour = text => { const n = text.match(/[\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const light = c => { const [r, g, b] = c.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b; };
  const behind = e => { for (let p = e; p; p = p.parentElement) { const c = colour(getComputedStyle(p).backgroundColor);
    if (c[3] > .5) return c; } return [255, 255, 255, 1]; };
  const says = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const faint = all.filter(says).filter(e => { const style = getComputedStyle(e); if (style.opacity < 1 || e.disabled) return false;
    const [a, b] = [light(colour(style.color)), light(behind(e))].sort((x, y) => y - x);
    return (a + .05) / (b + .05) < 3; }).map(e => name(e) + ": " + e.textContent.trim().slice(0, 30));
  const spans = all.filter(e => says(e) || ["IMG", "CANVAS", "svg", "INPUT", "BUTTON"].includes(e.tagName))
    .map(e => e.getBoundingClientRect()).map(r => [r.top + scrollY, r.bottom + scrollY]).sort((x, y) => x[0] - y[0]);
  let hole = 0, end = 0;
  for (const [top, bottom] of spans) { hole = Math.max(hole, top - end); end = Math.max(end, bottom); }
  return {cut, scrolled, faint, hole: Math.round(hole), width: document.scrollingElement.scrollWidth - document.scrollingElement.clientWidth};
})()
