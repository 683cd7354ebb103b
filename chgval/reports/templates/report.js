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

  // --- decisions: rows of the file that they are downloaded as, by the sample; other pages of the report, with
  // more samples or fewer, share them

  const KEY = `chgval:${data.key}`;
  const COLUMNS = ["index", "id", "label_name", "decision", "new_label_name", "by", "at"];
  let state = { by: "", decisions: {} };
  let undone = [];
  let canKeep = true;
  // Numbers tell rows of one id apart, where there are such.
  const keyOf = (row) => (data.ids_are_unique || row.index === "" ? `id ${row.id}` : String(row.index));
  const labelOf = (sample) => (sample.given < 0 ? "" : nameOf(sample.given));
  const decisionOf = (sample) => state.decisions[keyOf(sample)];
  const byKey = new Map(samples.map((sample) => [keyOf(sample), sample]));
  samples.forEach((sample, place) => (sample.place = place));

  function readState() {
    if (!canKeep) return;
    try {
      state = { ...state, ...JSON.parse(localStorage.getItem(KEY)) };
    } catch {
      canKeep = false;
      say("This browser keeps nothing of a page from a file: download your decisions before you close it.");
    }
  }
  // Other tabs may have written meanwhile: what they decided is read before this page writes.
  function changeState(change) {
    readState();
    change();
    try {
      if (canKeep) localStorage.setItem(KEY, JSON.stringify(state));
    } catch {
      canKeep = false;
      say("Decisions cannot be kept in this browser: download them before you close the page.");
    }
    showProgress();
  }
  function showProgress() {
    const here = samples.filter(decisionOf).length;
    const others = Object.keys(state.decisions).length - here;
    byId("progress").textContent = `${here.toLocaleString("en")} of ${samples.length.toLocaleString("en")} decided` +
      (others ? `, and ${others.toLocaleString("en")} that are not on this page` : "");
  }
  function decide(sample, word, label = -1) {
    const row = {
      index: String(sample.index), id: sample.id, label_name: labelOf(sample), decision: word,
      new_label_name: word === "relabel" ? nameOf(label) : "",
      by: state.by, at: new Date().toISOString().slice(0, 19) + "Z",
    };
    undone.push([sample, decisionOf(sample)]);
    changeState(() => (state.decisions[keyOf(sample)] = { ...decisionOf(sample), ...row }));
    showDecision(sample);
    if (shown.length && shown.at(-1) === sample) showDetail();
    else move(1);
  }
  function undo() {
    const last = undone.pop();
    if (!last) return;
    const [sample, before] = last;
    changeState(() => {
      if (before) state.decisions[keyOf(sample)] = before;
      else delete state.decisions[keyOf(sample)];
    });
    showDecision(sample);
    select(sample);
  }
  const textOf = (row) => (!row ? "" : row.decision === "relabel" ? `relabel: ${row.new_label_name}` : row.decision);

  // A spreadsheet runs cells that begin so; chgval takes the mark off again.
  const mark = (text) => (/^[=+\-@\t\r']/.test(text) && !/^[+-]?[0-9]+(\.[0-9]+)?$/.test(text) ? `'${text}` : text);
  const unmark = (text) => (/^'[=+\-@\t\r']/.test(text) ? text.slice(1) : text);
  function toCsv() {
    const rows = Object.values(state.decisions);
    const names = [...new Set([...COLUMNS, ...rows.flatMap(Object.keys)])];
    const place = (row) => byKey.get(keyOf(row))?.place ?? samples.length;
    rows.sort((a, b) => place(a) - place(b));
    const lines = rows.map((row) => names.map((name) => row[name] ?? ""));
    const quoted = (text, at) => (text === "" && names[at] !== "id" ? "" : `"${mark(text).replaceAll('"', '""')}"`);
    return [names, ...lines].map((line) => line.map(quoted).join(",") + "\r\n").join("");
  }
  function parseCsv(text) {
    const rows = [[""]];
    const [first] = text.split(/[\r\n]/, 1);
    const separator = [",", ";", "\t"].find((mark) => first.split(mark).length >= 3);
    let quoted = false;
    for (let at = 0; at < text.length; at++) {
      const letter = text[at];
      const row = rows[rows.length - 1];
      if (quoted) {
        if (letter !== '"') row[row.length - 1] += letter;
        else if (text[at + 1] === '"') row[row.length - 1] += text[++at];
        else quoted = false;
      } else if (letter === '"') quoted = true;
      else if (letter === separator) row.push("");
      else if (letter === "\n" || letter === "\r") rows.push([""]);
      else row[row.length - 1] += letter;
    }
    return rows.filter((row) => row.some((part) => part !== ""));
  }
  function textOfFile(bytes) {
    const start = new Uint8Array(bytes.slice(0, 2));
    const is16 = (start[0] === 255 && start[1] === 254) || (start[0] === 254 && start[1] === 255);
    return new TextDecoder(!is16 ? "utf-8" : start[0] === 255 ? "utf-16le" : "utf-16be", { fatal: true }).decode(bytes);
  }
  function load(bytes) {
    let text;
    try {
      text = textOfFile(bytes);
    } catch {
      say("No decisions: the file is not UTF-8. In a spreadsheet, save it as CSV UTF-8.");
      return;
    }
    const [names = [], ...rows] = parseCsv(text);
    const missing = ["id", "label_name", "decision"].find((name) => !names.includes(name));
    if (missing) {
      say(`No decisions: the file has no column ${missing}.`);
      return;
    }
    let taken = 0;
    let others = 0;
    let refused = 0;
    changeState(() => {
      for (const parts of rows) {
        const row = Object.fromEntries(COLUMNS.map((name) => [name, ""]));
        names.forEach((name, at) => (row[name] = unmark(parts[at] ?? "")));
        const sample = byKey.get(keyOf(row));
        const relabels = row.decision === "relabel";
        const fits = WORDS.includes(row.decision) && relabels === (row.new_label_name !== "") &&
          (!relabels || classes.includes(row.new_label_name));
        if (!fits || (sample && row.label_name !== labelOf(sample))) refused++;
        else {
          if (sample) row.index = String(sample.index);
          state.decisions[keyOf(row)] = row;
          if (sample) taken++;
          else others++;
        }
      }
    });
    undone = [];
    samples.forEach(showDecision);
    showDetail();
    say(
      `${taken} decisions loaded` + (others ? `, ${others} about samples that are not on this page kept` : "") +
        (refused ? `, ${refused} left out: another label, or no decision` : ""),
    );
  }

  readState();

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
    const about = { type: "button", class: "card", title: sample.id, tabindex: "-1" };
    const button = make("button", about, picture(sample, true));
    button.append(
      make("span", { class: "pair" }, `${nameOf(sample.given)} → ${nameOf(sample.suggested)}`),
      make("span", { class: "faint" }, `${share(sample.score)} ${sample.id}`),
      (sample.said = make("span", {})),
    );
    if (sample.issues) button.append(make("span", { class: "issues" }, sample.issues));
    button.addEventListener("focus", () => select(sample, false));
    button.addEventListener("click", () => select(sample));
    sample.button = button;
    sample.item = make("li", {}, button);
    showDecision(sample);
  }
  function showDecision(sample) {
    const row = decisionOf(sample);
    sample.said.textContent = textOf(row);
    sample.said.className = row ? row.decision : "";
  }
  const issuesOf = (sample) => (sample.issues ? sample.issues.split(", ") : []);
  const ORDERS = {
    score: (a, b) => a.place - b.place,
    value: (a, b) => (a.value ?? Infinity) - (b.value ?? Infinity),
    given: (a, b) => a.given - b.given || a.place - b.place,
    id: (a, b) => (a.id < b.id ? -1 : 1),
  };
  function filter() {
    const [given, suggested] = [byId("given").value, byId("suggested").value];
    const [status, least] = [byId("status").value, Number(byId("least").value) || 0];
    const [flagged, issue] = [byId("flagged").value, byId("issue").value];
    const search = byId("search").value.toLowerCase();
    shown = samples.filter((sample) => {
      const word = decisionOf(sample)?.decision ?? "none";
      return (
        (given === "" || sample.given === Number(given)) &&
        (suggested === "" || sample.suggested === Number(suggested)) &&
        (status === "" || status === word) && (flagged === "" || sample.flagged === (flagged === "yes")) &&
        (issue === "" || (issue === "any" ? sample.issues : issue === "none" ? !sample.issues : issuesOf(sample).includes(issue))) &&
        (sample.score ?? 0) >= least &&
        sample.id.toLowerCase().includes(search)
      );
    });
    const order = byId("sort");
    shown.sort(ORDERS[order.value]);
    sheet.setAttribute("aria-label", `Samples by ${order.selectedOptions[0].textContent}`);
    sheet.replaceChildren(...shown.map((sample) => sample.item));
    if (!shown.length) sheet.append(make("li", {}, "No samples; change the filters."));
    if (!shown.includes(current)) select(shown[0] ?? null, false);
  }
  function select(sample, focus = true) {
    if (current) {
      current.button.removeAttribute("aria-current");
      current.button.tabIndex = -1;
    }
    current = sample;
    if (sample) {
      sample.button.setAttribute("aria-current", "true");
      sample.button.tabIndex = 0; // the arrows go to the others
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
    const choose = make("select", { id: "other", "aria-label": "Another class" }, make("option", { value: "" }, "another class ..."));
    classes.forEach((name, label) => {
      if (label !== sample.given) choose.append(make("option", { value: label }, name));
    });
    const chosen = () => choose.value !== "" && decide(sample, "relabel", Number(choose.value));
    const relabel = make("button", { type: "button" }, "Relabel (Enter)");
    relabel.addEventListener("click", chosen);
    choose.addEventListener("keydown", (event) => event.key === "Enter" && (event.preventDefault(), chosen()));
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
        choice("drop", "Drop (d)"), choice("unsure", "Unsure (u)"),
        make("span", { class: "other" }, choose, relabel),
      ),
      make(
        "dl", {}, ...fact("decided", textOf(decisionOf(sample)) || "not yet"), ...fact("id", sample.id),
        ...fact("row", sample.index.toLocaleString("en")), ...(sample.issues ? fact("issues", sample.issues) : []),
        ...(sample.test_id === null ? [] : fact("in the test set", sample.test_id)),
        ...fact("label is wrong", `${share(sample.score)}${sample.flagged ? ", flagged" : ""}`),
        ...fact("suggestion is right", share(sample.sure)),
        ...fact("value", `${short(sample.value)} (higher than ${short(sample.percentile)} % of all)`),
      ),
    );
    const row = (title, places, said) => {
      const others = places.map((place) => data.neighbours[place]);
      const figure = (other) => make("figure", {}, picture(other, false), make("figcaption", {}, said(other)));
      if (others.length) detail.append(make("h3", {}, title), make("div", { class: "row" }, ...others.map(figure)));
    };
    row("Copies of it", sample.copies, (other) => `${nameOf(other.given)}: ${other.id}`);
    row(`Surely ${nameOf(sample.given)}, and most alike`, sample.near[0], (other) => other.id);
    row(`Surely ${nameOf(sample.suggested)}, and most alike`, sample.near[1], (other) => other.id);
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
    const { thresholds, counts, sums } = data.curve;
    const at = Number(byId("cut").value);
    const cut = thresholds[at];
    const text = `from ${cut.toFixed(3)}: ${counts[at].toLocaleString("en")} flagged, about ${Math.round(sums[at]).toLocaleString("en")} of them wrong`;
    byId("cut").setAttribute("aria-valuetext", text);
    byId("cut-text").textContent = text;
    const svg = frame(480, 180, text);
    // Low thresholds flag all samples; beside them what is wrong could not be seen.
    const most = Math.max(1, Math.min(counts[0], 2 * sums[0]));
    const x = thresholds.map((threshold) => 10 + 460 * threshold);
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
    const { labels, counts, flagged } = data.confusion;
    const table = byId("confusion");
    if (flagged > labels.length) {
      byId("confusion-note").textContent = `The ${labels.length} classes with most flags are shown, of ${flagged.toLocaleString("en")}.`;
    }
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

  if (data.extremes.length < classes.length) {
    const text = `${data.extremes.length.toLocaleString("en")} of ${classes.length.toLocaleString("en")} classes are shown.`;
    byId("extremes").before(make("p", {}, text));
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
  function find() {
    byId("filters").open = true;
    byId("search").focus();
  }
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (byId("review").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && typing) {
      if (current) current.button.focus();
    } else if (!typing && (event.target.tagName !== "BUTTON" || event.target.closest(".desk"))) {
      const act = { ...(current ? KEYS : {}), z: undo, "/": find }[event.key];
      if (!act) return;
      event.preventDefault();
      if (!event.repeat || event.key.startsWith("Arrow")) act(); // a key that is held decides once
    }
  });

  for (const id of ["given", "suggested", "histogram-class"]) {
    classes.forEach((name, label) => byId(id).append(make("option", { value: label }, name)));
  }
  for (const id of ["given", "suggested", "status", "flagged", "issue", "least", "sort", "search"]) byId(id).addEventListener("input", filter);
  const found = [...new Set(samples.flatMap(issuesOf))].sort();
  byId("issue").append(...found.map((name) => make("option", {}, name)));
  byId("with-issue").hidden = !found.length;
  byId("by").value = state.by;
  byId("by").addEventListener("input", () => changeState(() => (state.by = byId("by").value)));
  byId("download").addEventListener("click", () => {
    const link = make("a", { download: data.decisions, href: URL.createObjectURL(new Blob([toCsv()], { type: "text/csv" })) });
    link.click();
    URL.revokeObjectURL(link.href);
  });
  byId("load").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (file) load(await file.arrayBuffer());
    event.target.value = "";
  });
  byId("theme").addEventListener("click", () => {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  if (matchMedia("(max-width: 46rem)").matches) byId("filters").open = false;
  byId("cut").max = data.curve.thresholds.length - 1;
  byId("cut").value = data.cut;
  byId("cut").addEventListener("input", showCut);
  byId("cut-show").addEventListener("click", () => {
    byId("least").value = data.curve.thresholds[byId("cut").value];
    filter();
    open("review");
  });
  byId("histogram-class").addEventListener("change", showHistogram);
  addEventListener("storage", (event) => {
    if (event.key !== KEY) return;
    readState();
    showProgress();
    samples.forEach(showDecision);
    showDetail();
  });
  showProgress();
  showCut();
  showConfusion();
  showHistogram();
  showExtremes();
  filter();
})();
