
"use strict";
// Selects versions, changes axes, copies. All texts come ready from Python; nothing is formatted here.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const svg = document.getElementById("plot");
  const marks = all(".mark[data-point]", svg);
  const [LEFT, RIGHT, TOP, BOTTOM] = data.margins;
  const NS = svg.namespaceURI;
  let x = data.x, y = data.y, on = data.chosen;
  document.documentElement.classList.add("has-js");

  // --- drawing -------------------------------------------------------------------------------------------
  const make = (name, attributes, text) => {
    const node = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  function grid(width, height, px, py, taken) {
    const right = width - RIGHT, bottom = height - BOTTOM, nodes = [];
    const across = data.axes[x], up = data.axes[y];
    let last = -Infinity;
    for (const [place, label] of across.ticks) {
      if (px(place) - last < 54) continue;
      last = px(place);
      nodes.push(make("text", { x: px(place), y: bottom + 20, "text-anchor": "middle" }, label));
      nodes.push(make("line", { x1: px(place), x2: px(place), y1: bottom, y2: bottom + 5, class: "axis" }));
    }
    for (const [place, label] of up.ticks) {
      nodes.push(make("line", { x1: LEFT, x2: right, y1: py(place), y2: py(place) }));
      nodes.push(make("text", { x: LEFT - 8, y: py(place) + 4, "text-anchor": "end" }, label));
    }
    nodes.push(make("line", { x1: LEFT, x2: right, y1: bottom, y2: bottom, class: "axis" }));
    const limit = (line, label, spots) => {
      const text = make("text", { class: "limit-text" }, label);
      svg.append(text);
      const wide = text.getComputedTextLength();
      const box = ([a, b]) => [a - 2, b - 11, a + wide + 2, b + 4];
      const free = (spot) => {
        const own = box(spot);
        return own[0] > LEFT && own[2] < width && !taken.some((t) => own[0] < t[2] && own[2] > t[0] && own[1] < t[3] && own[3] > t[1]);
      };
      const spot = spots(wide).find(free);
      if (spot) {
        text.setAttribute("x", spot[0]);
        text.setAttribute("y", spot[1]);
        taken.push(box(spot));
        nodes.push(text);
      }
      text.remove();
      nodes.unshift(make("line", { ...line, class: "limit" }));
    };
    if (up.limit) {
      const at = py(up.limit[0]), steps = [...Array(21).keys()].map((n) => n / 20);
      limit({ x1: LEFT, x2: right, y1: at, y2: at }, up.limit[1],
        (wide) => steps.flatMap((part) => [15, -6].map((down) => [right - wide - part * (right - LEFT - wide - 4), at + down])));
    }
    if (across.limit) {
      const at = px(across.limit[0]);
      limit({ x1: at, x2: at, y1: TOP, y2: bottom }, across.limit[1],
        (wide) => [bottom - 7, TOP + 12, (TOP + bottom) / 2].flatMap((b) => [[at + 6, b], [at - 6 - wide, b]]));
    }
    const better = (axis, low, high) => (axis.up ? high : low);
    nodes.push(make("text", { x: right, y: height - 8, "text-anchor": "end", class: "label" },
      `${better(across, "← less is better · ", "")}${across.label}${better(across, "", " · more is better →")}`));
    nodes.push(make("text", { x: 4, y: 14, class: "label" },
      `${up.label} · ${better(up, "↓ less is better", "↑ more is better")}`));
    svg.querySelector(".grid").replaceChildren(...nodes);
  }

  // The versions that no other beats on the two axes shown, joined by steps.
  function stairs(px, py) {
    const sx = data.axes[x].up ? -1 : 1, sy = data.axes[y].up ? -1 : 1;
    const spots = data.points.filter((p) => p.status !== "refused" && p.at[x] && p.at[y])
      .map((p) => [p.at[x][0], p.at[y][0]])
      .sort((a, b) => sx * (a[0] - b[0]) || sy * (a[1] - b[1]));
    let best = Infinity, path = "";
    for (const [a, b] of spots) {
      if (sy * b >= best) continue;
      best = sy * b;
      path += path ? `H${px(a)}V${py(b)}` : `M${px(a)} ${py(b)}`;
    }
    svg.querySelector(".stairs").setAttribute("d", x === y ? "" : path);
  }

  // Names go where they cover nothing; the best, the original and the selected always show.
  const labels = [...svg.querySelector(".names").children];
  function names(width, height, spots, taken, whiskers) {
    const clash = (box, boxes, own) => box[0] < 4 || box[2] > width - 2 || box[1] < 18 || box[3] > height - BOTTOM + 4
      || boxes.some((t) => t[4] !== own && box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]);
    const weight = (i) => (i === on ? 3 : data.points[i].best ? 2 : data.points[i].status === "original" ? 1 : 0);
    for (const i of marks.map((_, k) => k).sort((a, b) => weight(b) - weight(a))) {
      const label = labels[i], p = data.points[i];
      label.style.display = spots[i] ? "" : "none";
      if (!spots[i]) continue;
      const name = width < 480 && p.name.length > 20 ? `${p.name.slice(0, 19).trim()}…` : p.name;
      label.textContent = name + (p.at[x][3] || p.at[y][3] ? " (off scale)" : "");
      label.setAttribute("text-anchor", "start");
      const [cx, cy] = spots[i], wide = label.getComputedTextLength();
      const room = [[14, 4], [-14 - wide, 4], [-wide / 2, -15], [-wide / 2, 24], [11, -11], [11, 19], [-11 - wide, -11],
        [-11 - wide, 19], [14, 34], [14, -26], [-14 - wide, 34], [-14 - wide, -26]];
      const box = ([a, b]) => [cx + a - 2, cy + b - 11, cx + a + wide + 2, cy + b + 4];
      const near = room.slice(0, 4), far = room.slice(4), both = [...taken, ...whiskers];
      let spot = near.find((r) => !clash(box(r), both, i)) || near.find((r) => !clash(box(r), taken, i))
        || far.find((r) => !clash(box(r), both, i)) || far.find((r) => !clash(box(r), taken, i));
      if (!spot && weight(i)) spot = [Math.min(Math.max(4, cx + 14), width - wide - 2) - cx, cx + 14 + wide < width ? 4 : -15];
      label.style.display = spot ? "" : "none";
      if (!spot) continue;
      label.setAttribute("x", cx + spot[0]);
      label.setAttribute("y", cy + spot[1]);
      taken.push(box(spot));
    }
  }

  function draw() {
    const width = Math.round(svg.parentElement.clientWidth) || 720;
    const height = Math.round(Math.min(480, Math.max(340, width * 0.62)));
    const px = (place) => +(LEFT + place * (width - LEFT - RIGHT)).toFixed(1);
    const py = (place) => +(TOP + (1 - place) * (height - TOP - BOTTOM)).toFixed(1);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.querySelector("title").textContent = `${data.axes[y].label} against ${data.axes[x].label}`;
    stairs(px, py);
    const taken = [], whiskers = [];
    const spots = marks.map((mark, i) => {
      const p = data.points[i], a = p.at[x], b = p.at[y];
      mark.style.display = a && b ? "" : "none";
      if (!a || !b) return null;
      const cx = px(a[0]), cy = py(b[0]);
      mark.setAttribute("transform", `translate(${cx},${cy})`);
      const line = (kind, low, high) => {
        let node = mark.querySelector(`.w${kind}`);
        if (!node) mark.prepend((node = make("line", { class: `w${kind}`, x1: 0, x2: 0, y1: 0, y2: 0 })));
        node.setAttribute(`${kind}1`, low.toFixed(1));
        node.setAttribute(`${kind}2`, high.toFixed(1));
      };
      line("x", px(a[1]) - cx, px(a[2]) - cx);
      line("y", py(b[1]) - cy, py(b[2]) - cy);
      mark.classList.toggle("off", Boolean(a[3] || b[3]));
      mark.setAttribute("aria-label", describe(i, "; "));
      const reach = p.best ? 13 : 10;
      taken.push([cx - reach, cy - reach, cx + reach, cy + reach, i]);
      whiskers.push([px(a[1]), cy - 1, px(a[2]), cy + 1], [cx - 1, py(b[2]), cx + 1, py(b[1])]);
      return [cx, cy];
    });
    names(width, height, spots, taken, whiskers);
    grid(width, height, px, py, taken);
  }

  function describe(i, between) {
    const p = data.points[i], off = p.at[x]?.[3] || p.at[y]?.[3] ? [" lies off the scale"] : [];
    const kind = p.best ? "best" : { kept: "frontier" }[p.status] || p.status;
    const parts = [`${p.name} (${kind})${off}`];
    for (const key of x === y ? [y] : [y, x]) parts.push(`${data.axes[key].label}: ${p.text[key]}`);
    return parts.join(between);
  }

  // --- selecting -----------------------------------------------------------------------------------------
  function select(i, { focus = false } = {}) {
    on = i;
    marks.forEach((mark, k) => {
      mark.classList.toggle("on", k === i);
      labels[k].classList.toggle("on", k === i);
      mark.setAttribute("aria-pressed", String(k === i));
      mark.setAttribute("tabindex", k === i ? "0" : "-1");
    });
    all(".panel").forEach((panel, k) => {
      panel.classList.toggle("on", k === i);
      panel.open = k === i;
    });
    all(".pick").forEach((pick) => pick.closest("tr").classList.toggle("on", +pick.dataset.point === i));
    layers(i);
    draw();
    if (focus) marks[i].focus();
  }

  function layers(i) {
    const name = document.getElementById("map-name");
    if (!name) return;
    name.textContent = all(".panel")[i].querySelector(".who").textContent;
    const { pool, versions, told } = data.layers;
    document.getElementById("map-told").textContent = told[i];
    const cells = [...document.getElementById("strip-map").children], lines = [...document.getElementById("layer-rows").rows];
    versions[i].forEach((row, k) => {
      const [place, form, bytes, damage, note, left] = row || [-1, -1, -1, -1, -1, 100];
      const said = (at) => (at < 0 ? "–" : pool[at]);
      const shade = place < 0 ? "f-none" : `f${place}`;
      const [title, what, size, hurt, why] = lines[k].cells;
      what.firstChild.className = `swatch ${shade}`;
      what.lastChild.textContent = form < 0 ? "untouched" : said(form);
      size.textContent = said(bytes);
      hurt.textContent = said(damage);
      why.textContent = said(note);
      const bar = cells[k].firstChild;
      bar.className = shade;
      bar.style.height = `${left}%`;
      cells[k].dataset.tip = `${title.textContent}\n${what.lastChild.textContent}, ${size.textContent}`;
    });
  }

  marks.forEach((mark, i) => {
    mark.addEventListener("click", () => select(i));
    mark.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") select(i);
      else if (["ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"].includes(event.key)) {
        const shown = marks.map((_, k) => k).filter((k) => data.points[k].at[x] && data.points[k].at[y])
          .sort((a, b) => data.points[a].at[x][0] - data.points[b].at[x][0] || a - b);
        const step = ["ArrowRight", "ArrowUp"].includes(event.key) ? 1 : -1;
        select(shown[(shown.indexOf(i) + step + shown.length) % shown.length], { focus: true });
      } else return;
      event.preventDefault();
    });
  });
  all(".pick").forEach((pick) => pick.addEventListener("click", () => select(+pick.dataset.point)));
  for (const [id, set] of [["axis-x", (v) => (x = v)], ["axis-y", (v) => (y = v)]]) {
    document.getElementById(id).addEventListener("change", (event) => { set(event.target.value); draw(); });
  }

  // --- tooltips: the title of a badge or a cell, readable with mouse, keyboard and finger ----------------------
  const tip = document.getElementById("tip");
  all(".tag[title], .strip-map [title]").forEach((node) => {
    node.dataset.tip = node.title;
    if (node.tabIndex >= 0) node.setAttribute("aria-label", node.title);
    node.removeAttribute("title");
  });
  function show(node) {
    const mark = node.closest(".mark[data-point]");
    tip.textContent = mark ? describe(+mark.dataset.point, "\n") : node.closest("[data-tip]").dataset.tip;
    tip.hidden = false;
    const box = (mark ? mark.querySelector(".hit") : node).getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(12, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 12);
    const above = box.top - own.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above > 4 ? above : box.bottom + 8}px`;
  }
  const target = (event) => event.target.closest?.(".mark[data-point], [data-tip]");
  const hide = () => { tip.hidden = true; };
  for (const kind of ["pointerover", "focusin", "click"]) {
    document.addEventListener(kind, (event) => { const node = target(event); if (node) show(node); else hide(); });
  }
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // --- copying and printing --------------------------------------------------------------------------------
  all(".copy").forEach((button) => button.addEventListener("click", async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(source);
      button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  }));
  let folded = [];
  addEventListener("beforeprint", () => { folded = all("details:not([open])"); folded.forEach((d) => { d.open = true; }); });
  addEventListener("afterprint", () => folded.forEach((d) => { d.open = false; }));

  let wait = 0;
  addEventListener("resize", () => { cancelAnimationFrame(wait); wait = requestAnimationFrame(draw); });
  select(on);
})();
