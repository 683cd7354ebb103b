"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { classes, samples } = data;
  const byId = (id) => document.getElementById(id);
  const WORDS = ["keep", "relabel", "drop", "unsure"];

  // Only text goes into elements: names come from strangers.
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  function draw(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }
  const nameOf = (label) => (label < 0 ? "(none)" : classes[label]);
  const share = (number) => (number === null ? "unknown" : number > 0.999 ? "> 99.9 %" : `${(100 * number).toFixed(1)} %`);
  const short = (number) => (number === null ? "unknown" : Number(number.toPrecision(3)).toString());
  let saying;
  function say(text) {
    byId("message").textContent = text;
    clearTimeout(saying);
    saying = setTimeout(() => (byId("message").textContent = ""), 6000);
  }

  // --- decisions: of samples by number of the row; rows of a loaded file that are not here are kept as they are

  const KEY = `chgval:${data.key}`;
  let state = { by: "", decisions: {}, others: [] };
  const undone = [];
  try {
    state = { ...state, ...JSON.parse(localStorage.getItem(KEY)) };
  } catch {
    say("This browser keeps nothing of a page from a file: download your decisions before you close it.");
  }
  function keepState() {
    try {
      localStorage.setItem(KEY, JSON.stringify(state));
    } catch {
      say("Decisions cannot be kept in this browser: download them before you close the page.");
    }
    const decided = samples.filter((sample) => state.decisions[sample.index]).length;
    byId("progress").textContent = `${decided.toLocaleString("en")} of ${samples.length.toLocaleString("en")} decided`;
  }
  function decide(sample, word, label = -1) {
    undone.push([sample, state.decisions[sample.index]]);
    state.decisions[sample.index] = { word, label, by: state.by, at: new Date().toISOString().slice(0, 19) + "Z" };
    changed(sample);
    move(1);
  }
  function undo() {
    const last = undone.pop();
    if (!last) return;
    const [sample, before] = last;
    if (before) state.decisions[sample.index] = before;
    else delete state.decisions[sample.index];
    changed(sample);
    select(sample);
  }
  function changed(sample) {
    keepState();
    showDecision(sample);
    if (sample === current) showDetail();
  }
  const textOf = (decision) =>
    !decision ? "" : decision.word === "relabel" ? `relabel: ${nameOf(decision.label)}` : decision.word;

  const COLUMNS = ["index", "id", "label_name", "decision", "new_label_name", "by", "at"];
  // A spreadsheet runs cells that begin so; chgval takes the mark off again.
  const mark = (text) => (/^[=+\-@\t\r']/.test(text) && !/^[+-]?[0-9]+(\.[0-9]+)?$/.test(text) ? `'${text}` : text);
  const unmark = (text) => (/^'[=+\-@\t\r']/.test(text) ? text.slice(1) : text);
  function toCsv() {
    const rows = samples.flatMap((sample) => {
      const decision = state.decisions[sample.index];
      if (!decision) return [];
      const fresh = decision.word === "relabel" ? nameOf(decision.label) : "";
      const label = sample.given < 0 ? "" : nameOf(sample.given);
      return [[String(sample.index), sample.id, label, decision.word, fresh, decision.by, decision.at]];
    });
    const quoted = (text) => (text === "" ? "" : `"${mark(text).replaceAll('"', '""')}"`);
    return [COLUMNS, ...rows, ...state.others].map((row) => row.map(quoted).join(",") + "\r\n").join("");
  }
  function parseCsv(text) {
    const rows = [[""]];
    let quoted = false;
    for (let at = text.startsWith("\ufeff") ? 1 : 0; at < text.length; at++) {
      const letter = text[at];
      const row = rows[rows.length - 1];
      if (quoted) {
        if (letter !== '"') row[row.length - 1] += letter;
        else if (text[at + 1] === '"') row[row.length - 1] += text[++at];
        else quoted = false;
      } else if (letter === '"') quoted = true;
      else if (letter === ",") row.push("");
      else if (letter === "\n") rows.push([""]);
      else if (letter !== "\r") row[row.length - 1] += letter;
    }
    return rows.filter((row) => row.length > 1 || row[0] !== "");
  }
  function load(text) {
    const [names, ...rows] = parseCsv(text);
    const at = Object.fromEntries(COLUMNS.map((name) => [name, (names || []).indexOf(name)]));
    if (at.id < 0 || at.label_name < 0 || at.decision < 0) {
      say("No decisions: the file lacks a column id, label_name or decision.");
      return;
    }
    let taken = 0;
    let refused = 0;
    for (const row of rows) {
      const part = (name) => (at[name] < 0 ? "" : unmark(row[at[name]] || ""));
      const same = samples.filter((sample) => sample.id === part("id"));
      const found = same.length > 1 ? same.find((sample) => String(sample.index) === part("index")) : same[0];
      const label = part("decision") === "relabel" ? classes.indexOf(part("new_label_name")) : -1;
      if (!found) {
        state.others.push(COLUMNS.map(part));
      } else if (
        part("label_name") !== (found.given < 0 ? "" : nameOf(found.given)) ||
        !WORDS.includes(part("decision")) || (part("decision") === "relabel" && label < 0)
      ) {
        refused++;
      } else {
        state.decisions[found.index] = { word: part("decision"), label, by: part("by"), at: part("at") };
        taken++;
      }
    }
    state.others = [...new Map(state.others.map((row) => [row.slice(0, 3).join("\u0000"), row])).values()];
    keepState();
    samples.forEach(showDecision);
    showDetail();
    const kept = rows.length - taken - refused;
    say(
      `${taken} decisions loaded` + (kept ? `, ${kept} about samples that are not on this page kept` : "") +
        (refused ? `, ${refused} left out: another label, or no decision` : ""),
    );
  }

  // --- the sheet

  const sheet = byId("sheet");
  let shown = [];
  let current = null;
  const loader = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        target.src = target.sample.picture;
        loader.unobserve(target);
      }
    },
    { rootMargin: "600px" },
  );
  function picture(sample, lazily) {
    if (!sample.picture) return make("span", { class: "no-picture" }, sample.id);
    const image = make("img", { alt: "", class: sample.small ? "small" : "" });
    if (lazily) {
      image.sample = sample;
      loader.observe(image);
    } else image.src = sample.picture;
    return image;
  }
  for (const sample of samples) {
    const button = make("button", { type: "button", class: "card", title: sample.id }, picture(sample, true));
    button.append(
      make("span", { class: "pair" }, `${nameOf(sample.given)} → ${nameOf(sample.suggested)}`),
      make("span", { class: "faint" }, `${share(sample.score)} ${sample.id}`),
      (sample.said = make("span", {})),
    );
    button.addEventListener("focus", () => select(sample, false));
    button.addEventListener("click", () => select(sample));
    sample.button = button;
    sample.item = make("li", {}, button);
    showDecision(sample);
  }
  function showDecision(sample) {
    const decision = state.decisions[sample.index];
    sample.said.textContent = textOf(decision);
    sample.said.className = decision ? decision.word : "";
  }
  const ORDERS = {
    score: (a, b) => a.place - b.place,
    value: (a, b) => (a.value ?? Infinity) - (b.value ?? Infinity),
    given: (a, b) => a.given - b.given || a.place - b.place,
    id: (a, b) => (a.id < b.id ? -1 : 1),
  };
  samples.forEach((sample, place) => (sample.place = place));
  function filter() {
    const [given, suggested] = [byId("given").value, byId("suggested").value];
    const [status, least] = [byId("status").value, Number(byId("least").value) || 0];
    const search = byId("search").value.toLowerCase();
    shown = samples.filter((sample) => {
      const word = (state.decisions[sample.index] || { word: "none" }).word;
      return (
        (given === "" || sample.given === Number(given)) &&
        (suggested === "" || sample.suggested === Number(suggested)) &&
        (status === "" || status === word) && (sample.score ?? 0) >= least &&
        sample.id.toLowerCase().includes(search)
      );
    });
    shown.sort(ORDERS[byId("sort").value]);
    sheet.replaceChildren(...shown.map((sample) => sample.item));
    if (!shown.length) sheet.append(make("li", {}, "No samples; change the filters."));
    if (!shown.includes(current)) select(shown[0] ?? null, false);
  }
  function select(sample, focus = true) {
    if (current) current.button.removeAttribute("aria-current");
    current = sample;
    if (sample) {
      sample.button.setAttribute("aria-current", "true");
      if (focus && document.activeElement !== sample.button) sample.button.focus();
    }
    showDetail();
  }
  function move(by) {
    const at = shown.indexOf(current) + by;
    if (shown.length) select(shown[Math.max(0, Math.min(shown.length - 1, at))]);
  }

  const detail = byId("detail");
  function showDetail() {
    detail.replaceChildren();
    if (!current) return;
    const sample = current;
    const choose = make("select", { id: "other", "aria-label": "Relabel as" }, make("option", { value: "" }, "other class ..."));
    classes.forEach((name, label) => {
      if (label !== sample.given) choose.append(make("option", { value: label }, name));
    });
    choose.addEventListener("change", () => choose.value !== "" && decide(sample, "relabel", Number(choose.value)));
    const choice = (word, text, label) => {
      const button = make("button", { type: "button" }, text);
      button.addEventListener("click", () => decide(sample, word, label));
      return button;
    };
    const fact = (name, text) => [make("dt", {}, name), make("dd", {}, text)];
    detail.append(
      picture(sample, false),
      make("h2", {}, `${nameOf(sample.given)} → ${nameOf(sample.suggested)}`),
      make(
        "div", { class: "choices" },
        choice("keep", "Keep (k)"),
        ...(sample.suggested < 0 ? [] : [choice("relabel", `Relabel: ${nameOf(sample.suggested)} (r)`, sample.suggested)]),
        choice("drop", "Drop (d)"), choice("unsure", "Unsure (u)"), choose,
      ),
      make(
        "dl", {}, ...fact("decided", textOf(state.decisions[sample.index]) || "not yet"), ...fact("id", sample.id),
        ...fact("row", sample.index.toLocaleString("en")), ...fact("label is wrong", share(sample.score)),
        ...fact("suggestion is right", share(sample.sure)),
        ...fact("value", `${short(sample.value)} (higher than ${short(sample.percentile)} % of all)`),
      ),
    );
    for (const [at, label] of [[0, sample.given], [1, sample.suggested]]) {
      const near = sample.near[at].map((place) => data.neighbours[place]);
      if (!near.length) continue;
      const figure = (other) => make("figure", {}, picture(other, false), make("figcaption", {}, other.id));
      detail.append(
        make("h3", {}, `Surely ${nameOf(label)}, and most alike`), make("div", { class: "row" }, ...near.map(figure)),
      );
    }
    if (sample.epochs) detail.append(make("div", { class: "figure" }, epochsOf(sample)));
  }

  // --- figures

  function frame(width, height, label) {
    return draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  }
  const points = (xs, ys) => xs.map((x, at) => `${x.toFixed(1)},${ys[at].toFixed(1)}`).join(" ");
  function epochsOf(sample) {
    const { numbers, middle, low, high } = data.epochs;
    const all = [...sample.epochs, ...low, ...high].filter((number) => number !== null);
    const [least, most] = [Math.min(...all), Math.max(...all)];
    const x = numbers.map((number) => 10 + (280 * (number - numbers[0])) / Math.max(1, numbers.at(-1) - numbers[0]));
    const y = (number) => 110 - (100 * (number - least)) / (most - least || 1);
    const svg = frame(300, 140, `Value by epoch, from ${short(sample.epochs[0])} to ${short(sample.epochs.at(-1))}`);
    svg.append(
      draw("polygon", { class: "band", points: points([...x, ...x.toReversed()], [...low.map(y), ...high.toReversed().map(y)]) }),
      draw("polyline", { class: "middle", points: points(x, middle.map(y)) }),
    );
    const there = x.map((_, at) => at).filter((at) => sample.epochs[at] !== null);
    svg.append(
      draw("polyline", { class: "line", points: points(there.map((at) => x[at]), there.map((at) => y(sample.epochs[at]))) }),
      draw("text", { x: 10, y: 132 }, `value, epochs ${numbers[0]} to ${numbers.at(-1)}; grey: 80 % of all`),
    );
    return svg;
  }
  function bars(counts, from, to, label) {
    const most = Math.max(1, ...counts);
    const svg = frame(480, 180, label);
    counts.forEach((count, at) => {
      const height = (140 * count) / most;
      const width = 460 / counts.length;
      svg.append(draw("rect", { class: "bar-of", x: 10 + at * width, y: 150 - height, width: width - 1, height }));
    });
    svg.append(
      draw("line", { class: "axis", x1: 10, x2: 470, y1: 150, y2: 150 }),
      draw("text", { x: 10, y: 168 }, from), draw("text", { x: 470, y: 168, "text-anchor": "end" }, to),
      draw("text", { x: 10, y: 10 }, `most: ${most.toLocaleString("en")}`),
    );
    return svg;
  }
  function showHistogram() {
    const at = Number(byId("histogram-class").value);
    const counts = at < 0 ? data.histogram.all : data.histogram.classes[at];
    const { low, high } = data.histogram;
    const label = `Values of ${at < 0 ? "all samples" : classes[at]}, from ${short(low)} or less to ${short(high)} or more`;
    byId("histogram").replaceChildren(bars(counts, `${short(low)} or less`, `${short(high)} or more`, label));
  }
  function showCut() {
    const { counts, sums } = data.curve;
    const cut = Number(byId("cut").value);
    const at = Math.round(cut * (counts.length - 1));
    const text = `from ${cut.toFixed(3)}: ${counts[at].toLocaleString("en")} flagged, about ${Math.round(sums[at]).toLocaleString("en")} of them wrong`;
    byId("cut-text").textContent = text;
    const svg = frame(480, 180, text);
    // Low thresholds flag all samples; beside them what is wrong could not be seen.
    const most = Math.max(1, Math.min(counts[0], 2 * sums[0]));
    const x = counts.map((_, step) => 10 + (460 * step) / (counts.length - 1));
    const y = (number) => 150 - (130 * Math.min(number, most)) / most;
    svg.append(
      draw("polyline", { class: "middle", points: points(x, counts.map(y)) }),
      draw("polyline", { class: "line", points: points(x, sums.map(y)) }),
      draw("line", { class: "axis", x1: x[at], x2: x[at], y1: 10, y2: 150 }),
      draw("text", { x: 10, y: 168 }, "score 0"), draw("text", { x: 470, y: 168, "text-anchor": "end" }, "1"),
      draw("text", { x: 10, y: 14 }, `top: ${Math.round(most).toLocaleString("en")}`),
      draw("text", { x: 470, y: 14, "text-anchor": "end" }, "dashed: flagged; line: wrong among them"),
    );
    byId("curve").replaceChildren(svg);
  }
  function showConfusion() {
    const { labels, counts } = data.confusion;
    const table = byId("confusion");
    if (!labels.length) {
      table.append(make("caption", {}, "Nothing is flagged."));
      return;
    }
    const most = Math.max(...counts.flat());
    const head = make("tr", {}, make("td"), ...labels.map((label) => make("th", { scope: "col", title: nameOf(label) }, nameOf(label))));
    table.append(make("thead", {}, head));
    const body = make("tbody");
    counts.forEach((row, from) => {
      const line = make("tr", {}, make("th", { scope: "row", title: nameOf(labels[from]) }, nameOf(labels[from])));
      row.forEach((count, to) => {
        const cell = make("td");
        if (count) {
          const button = make("button", { type: "button", "aria-label": `${nameOf(labels[from])} suggested to be ${nameOf(labels[to])}: ${count}` }, count.toLocaleString("en"));
          button.style.background = `rgba(var(--heat), ${(0.05 + 0.3 * (count / most)).toFixed(2)})`;
          button.addEventListener("click", () => {
            byId("given").value = labels[from];
            byId("suggested").value = labels[to];
            filter();
            open("review");
          });
          cell.append(button);
        }
        line.append(cell);
      });
      body.append(line);
    });
    table.append(body);
  }
  function showExtremes() {
    const row = (parts) =>
      make("div", { class: "row" }, ...parts.map((part) => make("figure", {}, picture(part, true), make("figcaption", {}, `${short(part.value)} ${part.id}`))));
    for (const { label, lowest, highest } of data.extremes) {
      byId("extremes").append(
        make("h3", {}, nameOf(label)), make("p", { class: "faint" }, "lowest"), row(lowest),
        make("p", { class: "faint" }, "highest"), row(highest),
      );
    }
  }

  // --- parts of the page, and keys

  const tabs = [...document.querySelectorAll("[role=tab]")];
  function open(id) {
    for (const tab of tabs) {
      const chosen = tab.getAttribute("aria-controls") === id;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !chosen;
    }
  }
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = tabs[(at + by + tabs.length) % tabs.length];
      open(next.getAttribute("aria-controls"));
      next.focus();
      event.stopPropagation();
    });
  });
  function columnsOfSheet() {
    return getComputedStyle(sheet).gridTemplateColumns.split(" ").length;
  }
  const KEYS = {
    k: () => decide(current, "keep"),
    r: () => (current.suggested < 0 ? say("There is no suggestion; press c to choose a class.") : decide(current, "relabel", current.suggested)),
    d: () => decide(current, "drop"),
    u: () => decide(current, "unsure"),
    c: () => byId("other").focus(),
    ArrowRight: () => move(1),
    ArrowLeft: () => move(-1),
    ArrowDown: () => move(columnsOfSheet()),
    ArrowUp: () => move(-columnsOfSheet()),
  };
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (byId("review").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing) {
      if (current) current.button.focus();
    } else if (!typing) {
      const act = { ...(current ? KEYS : {}), z: undo, "/": () => byId("search").focus() }[event.key];
      if (!act) return;
      event.preventDefault();
      act();
    }
  });

  for (const id of ["given", "suggested", "histogram-class"]) {
    classes.forEach((name, label) => byId(id).append(make("option", { value: label }, name)));
  }
  for (const id of ["given", "suggested", "status", "least", "sort", "search"]) byId(id).addEventListener("input", filter);
  byId("by").value = state.by;
  byId("by").addEventListener("input", () => {
    state.by = byId("by").value;
    keepState();
  });
  byId("download").addEventListener("click", () => {
    const link = make("a", { download: data.decisions, href: URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  byId("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) load(await file.text());
    event.target.value = "";
  });
  byId("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  if (matchMedia("(max-width: 46rem)").matches) byId("filters").open = false;
  byId("cut").value = data.cut;
  byId("cut").addEventListener("input", showCut);
  byId("cut-show").addEventListener("click", () => {
    byId("least").value = byId("cut").value;
    filter();
    open("review");
  });
  byId("histogram-class").addEventListener("change", showHistogram);
  keepState();
  showCut();
  showConfusion();
  showHistogram();
  showExtremes();
  filter();
})();
