"use strict";
(() => {
  const COLUMNS = 12; // tokens of a block, which is made or thrown away as a whole
  const data = JSON.parse(document.getElementById("data").textContent);
  const details = document.getElementById("details");

  const numbers = (text, Kind) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Kind(bytes.buffer);
  };
  const element = (tag, kind, text) => {
    const made = document.createElement(tag);
    made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toFixed(2)) + "%";

  const show = (scroller) => {
    const text = data.texts[scroller.dataset.text];
    const { layers, count, top } = text;
    const index = numbers(text.index, data.wide ? Uint32Array : Uint16Array);
    const p = numbers(text.p, Uint16Array);
    const at = (token, layer, rank) => (token * layers + layer) * top + rank;
    const word = (token, layer, rank) => data.words[index[at(token, layer, rank)]];
    const same = (token, layer) =>
      index[at(token, layer, 0)] === index[at(token, layers - 1, 0)];
    let current = [0, 0];

    const side = element("div", "layers");
    side.setAttribute("aria-hidden", "true");
    side.append(element("span", "corner", "layer"));
    for (let layer = 0; layer < layers; layer++) side.append(element("span", "layer", layer + 1));
    scroller.append(side);

    const line = (kind, first) => {
      const made = element("div", kind);
      made.setAttribute("role", "row");
      made.append(first);
      return made;
    };
    const fill = (block) => {
      if (block.firstChild) return;
      const from = Number(block.dataset.from);
      const to = Math.min(from + COLUMNS, count);
      const head = line("line head", element("span", "corner", "layer"));
      for (let token = from; token < to; token++) {
        const read = element("span", "read", data.words[text.read[token]]);
        read.setAttribute("role", "columnheader");
        read.title = read.textContent;
        read.prepend(element("small", "", token + 1));
        head.append(read);
      }
      block.append(head);
      for (let layer = 0; layer < layers; layer++) {
        const row = line("line", element("span", "layer", layer + 1));
        row.firstChild.setAttribute("role", "rowheader");
        for (let token = from; token < to; token++) {
          const cell = element("span", "cell", word(token, layer, 0));
          cell.setAttribute("role", "gridcell");
          if (same(token, layer)) cell.classList.add("same");
          cell.style.setProperty("--p", (100 * p[at(token, layer, 0)]) / data.scale + "%");
          cell.dataset.at = token + "," + layer;
          cell.tabIndex = token === current[0] && layer === current[1] ? 0 : -1;
          row.append(cell);
        }
        block.append(row);
      }
    };
    const blocks = [];
    for (let from = 0; from < count; from += COLUMNS) {
      const block = element("div", "block");
      block.setAttribute("role", "grid");
      block.setAttribute("aria-label", `Tokens ${from + 1} to ${Math.min(from + COLUMNS, count)}`);
      block.dataset.from = from;
      block.style.width = `calc(${Math.min(COLUMNS, count - from)} * var(--column))`;
      block.style.height = `calc(${layers + 1.8} * var(--row))`;
      blocks.push(block);
      scroller.append(block);
    }
    const near = new IntersectionObserver(
      (seen) => {
        for (const { target, isIntersecting } of seen) {
          if (isIntersecting) fill(target);
          else if (!target.contains(document.activeElement)) target.replaceChildren();
        }
      },
      { root: scroller, rootMargin: "0px 600px" },
    );
    blocks.forEach((block) => near.observe(block));

    const cellAt = (token, layer) => {
      const block = blocks[Math.floor(token / COLUMNS)];
      fill(block);
      return block.querySelector(`[data-at="${token},${layer}"]`);
    };
    const describe = (cell) => {
      const [token, layer] = cell.dataset.at.split(",").map(Number);
      document.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
      cell.classList.add("chosen");
      const heading = element("p", "");
      heading.append("layer ", element("b", "", layer + 1), ", after token ", String(token + 1), " ");
      heading.append(element("code", "", data.words[text.read[token]]));
      if (same(token, layer)) heading.append(", as the last layer");
      else heading.append(", the last layer: ", element("code", "", word(token, layers - 1, 0)));
      const list = element("ol", "");
      for (let rank = 0; rank < top; rank++) {
        const share = p[at(token, layer, rank)] / data.scale;
        const entry = element("li", "");
        entry.append(element("span", "", word(token, layer, rank)));
        entry.append(element("span", "", percent(share)));
        entry.firstChild.style.setProperty("--p", 100 * share + "%");
        list.append(entry);
      }
      details.replaceChildren(heading, list);
      details.hidden = false;
    };
    const choose = (cell) => {
      cellAt(...current)?.setAttribute("tabindex", "-1");
      current = cell.dataset.at.split(",").map(Number);
      cell.tabIndex = 0;
      describe(cell);
    };
    const cellOf = (event) => event.target.closest?.(".cell");
    let pointer = "";
    scroller.addEventListener("pointerover", (event) => {
      // Cells that are scrolled under a pointer at rest are not looked at.
      const place = event.clientX + "," + event.clientY;
      const cell = cellOf(event);
      if (cell && place !== pointer) describe(cell);
      pointer = place;
    });
    scroller.addEventListener("focusin", (event) => {
      const cell = cellOf(event);
      if (cell) choose(cell);
    });
    scroller.addEventListener("click", (event) => cellOf(event)?.focus({ preventScroll: true }));
    const moves = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
      PageUp: [0, -10], PageDown: [0, 10], Home: [-Infinity, 0], End: [Infinity, 0],
    };
    scroller.addEventListener("keydown", (event) => {
      const move = moves[event.key];
      if (!move || !cellOf(event)) return;
      event.preventDefault();
      const clip = (value, most) => Math.max(0, Math.min(most, value));
      const token = clip(current[0] + move[0], count - 1);
      const layer = clip(current[1] + move[1], layers - 1);
      const cell = cellAt(token, layer);
      cell.focus({ preventScroll: true });
      // The sticky row and column would cover what a browser scrolls just into sight.
      const box = cell.getBoundingClientRect();
      const frame = scroller.getBoundingClientRect();
      const [left, above] = [side.offsetWidth + 4, side.firstChild.offsetHeight + 4];
      scroller.scrollBy(
        Math.min(0, box.left - frame.left - left) || Math.max(0, box.right - frame.right + 20),
        Math.min(0, box.top - frame.top - above) || Math.max(0, box.bottom - frame.bottom + 20),
      );
      const below = cell.getBoundingClientRect().bottom + details.offsetHeight + 8 - innerHeight;
      if (below > 0) scrollBy(0, below);
    });
    fill(blocks[0]);
    addEventListener("beforeprint", () => blocks.forEach(fill));
  };
  document.querySelectorAll(".scroller").forEach(show);
})();
