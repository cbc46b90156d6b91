"use strict";
// Draws the blocks of a page from its data. What comes from data becomes text, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const el = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) node.append(child);
    return node;
  };
  const svg = (name, attributes, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  // A name from data keeps its direction to itself.
  const text = (value) => el("bdi", {}, String(value));
  const whole = new Intl.NumberFormat("en");
  const shown = (value, digits) => value === null || value === undefined ? "" :
    digits === undefined ? whole.format(value) :
    new Intl.NumberFormat("en", {minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: "negative"}).format(value);
  const plain = (value) => String(value ?? "").normalize("NFKC").toLowerCase();
  let ids = 0;

  // How clips spread over the scores: heights by the square root, a mark at the threshold.
  const spark = ({counts, at, about}) => {
    const high = Math.sqrt(Math.max(1, ...counts)), step = 144 / counts.length;
    const path = counts.map((n, i) => n ? `M${(i * step).toFixed(1)} 26v${(-Math.max(1, 25 * Math.sqrt(n) / high)).toFixed(1)}h${(step - .4).toFixed(2)}V26z` : "").join("");
    const node = svg("svg", {viewBox: "0 0 144 26", class: "spark", role: "img", "aria-label": about},
      svg("path", {d: path, fill: "currentColor"}));
    if (at !== null) node.append(svg("line", {x1: at * 144, x2: at * 144, y1: 0, y2: 26, "stroke-width": 1.5}));
    return node;
  };

  const cell = (column, value, highest) => {
    switch (column.kind) {
      case "number": return el("td", {class: "number"}, shown(value, column.digits));
      case "bar": {
        const bar = el("span", {class: "bar", "aria-hidden": "true"});
        bar.style.width = `${6 * (value || 0) / (highest || 1)}rem`;
        return el("td", {class: "bars"}, bar, ` ${shown(value, column.digits)}`);
      }
      case "spark": return el("td", {}, value ? spark(value) : "");
      case "wide": return el("td", {class: "wide"}, text(value ?? ""));
      default: return el("td", {}, text(value ?? ""));
    }
  };

  const blocks = {
    text: ({text: value, warn}) => el("p", {class: warn ? "warn" : "soft"}, value),
    heading: ({text: value}) => el("h3", {}, value),
    tiles: ({rows}) => el("dl", {class: "tiles"}, rows.map(([name, value]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, text(value))))),
    facts: ({rows}) => el("dl", {class: "facts"}, rows.flatMap(([name, value]) =>
      [el("dt", {}, name), el("dd", {}, text(value))])),
    figures: ({figures}) => el("div", {class: "figures"}, figures.map(({id, caption}) =>
      el("figure", {}, document.getElementById(id).content.cloneNode(true), el("figcaption", {}, caption)))),

    table({caption, columns, rows, search, limit = 25}) {
      const id = `table-${++ids}`;
      const body = el("tbody"), status = el("span", {class: "soft", role: "status"});
      const highest = columns.map((_, i) => Math.max(0, ...rows.map((row) => typeof row[i] === "number" ? row[i] : 0)));
      let order = rows.map((_, i) => i), query = "", all = false;
      const texts = search ? rows.map((row) => plain(row.filter((v) => typeof v === "string").join("\n"))) : [];
      const more = el("button", {class: "more", type: "button", onclick: () => { all = true; draw(); }});
      const draw = () => {
        const found = query ? order.filter((i) => texts[i].includes(query)) : order;
        const now = all ? found : found.slice(0, limit);
        body.replaceChildren(...now.map((i) => {
          const cells = columns.map((column, c) => cell(column, rows[i][c], highest[c]));
          const head = el("th", {scope: "row", class: cells[0].className}, ...cells[0].childNodes);
          cells[0] = head;
          return el("tr", {}, cells);
        }));
        more.hidden = now.length === found.length;
        more.textContent = `Show all ${whole.format(found.length)} rows`;
        status.textContent = query ? `${whole.format(found.length)} of ${whole.format(rows.length)} rows` : "";
      };
      const heads = columns.map((column, c) => {
        const sorts = column.kind !== "spark" && rows.length > 1;
        const head = el("th", {scope: "col", class: column.kind === "number" ? "number" : ""});
        if (!sorts) { head.append(column.name); return head; }
        head.append(el("button", {type: "button", title: `Sort by ${column.name}`, onclick: () => {
          const numeric = column.kind === "number" || column.kind === "bar";
          const last = head.getAttribute("aria-sort");
          const ascending = last ? last === "descending" : !numeric;
          for (const other of heads) other.removeAttribute("aria-sort");
          head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
          const sign = ascending ? 1 : -1;
          order.sort((a, b) => {
            const [x, y] = [rows[a][c], rows[b][c]];
            if (x === null || y === null) return (x === null) - (y === null);
            return sign * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
          });
          draw();
        }}, column.name));
        return head;
      });
      draw();
      const tools = search && rows.length > 8 ? el("div", {class: "tools"},
        el("label", {for: id}, search),
        el("input", {type: "search", id, autocomplete: "off", spellcheck: "false",
          oninput: (event) => { query = plain(event.target.value.trim()); draw(); }}), status) : null;
      return el("div", {}, tools,
        el("div", {class: "scroll", role: "region", tabindex: "0", "aria-label": caption},
          el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, heads)), body)), more);
    },

    matrix({caption, names, values}) {
      return el("div", {class: "scroll", role: "region", tabindex: "0", "aria-label": caption},
        el("table", {class: "matrix"}, el("caption", {}, caption),
          el("thead", {}, el("tr", {}, el("td"), names.map((name, i) =>
            el("th", {scope: "col", title: name, "aria-label": name}, String(i + 1))))),
          el("tbody", {}, names.map((name, i) => el("tr", {}, el("th", {scope: "row"}, `${i + 1} `, text(name)),
            values[i].map((share, j) => {
              if (i === j) return el("td", {class: "soft"}, "–");
              const td = el("td", {title: `${name}: ${share} % have ${names[j]}`}, share >= 1 ? String(share) : "");
              td.style.background = `color-mix(in srgb, var(--accent) ${Math.min(60, share * .6)}%, transparent)`;
              return td;
            }))))));
    },

    tree({nodes, about}) {
      const item = ({name, clips, own, below}) => {
        const line = [text(name), el("span", {class: "count"}, ` ${whole.format(clips)}` +
          (below.length && own ? `, ${whole.format(own)} of them itself` : ""))];
        if (!below.length) return el("li", {}, el("div", {class: "leaf"}, line));
        return el("li", {}, el("details", {}, el("summary", {}, line), el("ul", {}, below.map(item))));
      };
      return el("div", {class: "tree", role: "group", "aria-label": about}, el("ul", {}, nodes.map(item)));
    },

    clips({groups, search}) {
      const id = `clips-${++ids}`, status = el("span", {class: "soft", role: "status"});
      const cards = [];
      const sounds = new Map();  // of a preview's number
      const sound = (preview) => {
        if (!sounds.has(preview)) {
          const bytes = Uint8Array.from(atob(data.previews[preview].mp3), (c) => c.charCodeAt(0));
          sounds.set(preview, URL.createObjectURL(new Blob([bytes], {type: "audio/mpeg"})));
        }
        return sounds.get(preview);
      };
      const card = (clip) => {
        const node = el("article", {class: "card"}, el("div", {class: "name"}, text(clip.name)));
        const preview = data.previews[clip.preview];
        const picture = preview?.png, audio = preview?.mp3;
        if (picture) node.append(el("img", {alt: `Spectrogram of ${clip.piece}, 0 to 8 kHz`, loading: "lazy",
          src: `data:image/png;base64,${picture}`}));
        if (audio) node.append(el("audio", {controls: true, preload: "metadata", src: sound(clip.preview),
          "aria-label": `Play ${clip.name}`}));
        if (clip.why) node.append(el("div", {class: "nothing"}, text(clip.why)));
        node.append(el("ul", {class: "chips"}, clip.chips.map(([name, score, is]) =>
          el("li", {class: is ? "this" : ""}, text(name), ` ${score}`))));
        for (const line of clip.lines) node.append(el("div", {class: "meta"}, text(line)));
        cards.push({node, words: plain([clip.name, ...clip.lines, ...clip.chips.map((c) => c[0])].join("\n"))});
        return node;
      };
      const boxes = groups.map(({name, note, kinds}, first) => {
        const box = el("details", {class: "group"}, el("summary", {}, text(name), el("span", {class: "soft"}, ` ${note}`)));
        // Players and pictures are made when they are first seen: a hundred at once take a while.
        const fill = () => {
          if (box.dataset.filled) return;
          box.dataset.filled = "yes";
          for (const {kind, clips} of kinds) {
            box.append(el("section", {}, el("h4", {}, kind), el("div", {class: "cards"}, clips.map(card))));
          }
        };
        box.addEventListener("toggle", () => { if (box.open) fill(); });
        if (!first) { box.open = true; fill(); }
        return {box, fill, kinds};
      });
      const filter = (event) => {
        const query = plain(event.target.value.trim());
        if (query) for (const {fill} of boxes) fill();
        let found = 0;
        for (const {node, words} of cards) {
          node.hidden = query !== "" && !words.includes(query);
          found += !node.hidden;
        }
        boxes.forEach(({box}, place) => {
          for (const section of box.querySelectorAll("section")) section.hidden = !section.querySelector(".card:not([hidden])");
          const any = box.querySelector(".card:not([hidden])");
          box.hidden = query !== "" && !any;
          box.open = query ? Boolean(any) : place === 0;
        });
        status.textContent = query ? `${whole.format(found)} clips` : "";
      };
      return el("div", {}, el("div", {class: "tools"}, el("label", {for: id}, search),
        el("input", {type: "search", id, autocomplete: "off", spellcheck: "false", oninput: filter}), status),
        boxes.map(({box}) => box));
    },
  };

  const main = document.getElementById("content"), list = document.getElementById("sections");
  for (const {id, title, blocks: inside} of data.sections) {
    const section = el("section", {"aria-labelledby": id}, el("h2", {id}, title));
    for (const block of inside) section.append(blocks[block.type](block));
    main.append(section);
    list.append(el("li", {}, el("a", {href: `#${id}`}, title)));
  }
  // One sound at a time.
  document.addEventListener("play", (event) => {
    for (const other of document.querySelectorAll("audio")) if (other !== event.target) other.pause();
  }, true);
  document.documentElement.dataset.ready = "yes";
})();
