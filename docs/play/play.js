// Draws the recording of `python docs/record_play.py`. The page itself computes only sums, counts and largest values. It
// needs no library and no network, so it also opens from a disk.
(async () => {
  "use strict";

  const data = globalThis.RESA_PLAY;
  const b = data.config.block_size;
  const intervals = data.ways.map((way) => Number(way.match(/^ReSA f=(\d+)$/)?.[1])).filter(Boolean).sort((one, other) => one - other);
  const ratios = data.scenes[0].settings.map((setting) => setting.ratio);
  const scenes = await Promise.all(data.scenes.map(prepared));
  const element = (id) => document.getElementById(id);

  // The place shown. `frame` counts steps and rectifications.
  const state = { model: 0, interval: intervals.indexOf(32), ratio: ratios.indexOf(0.1), frame: Infinity, playing: false, lookedAt: null };

  // The page opens on the first stop: late in a window of the real text, where sparse decoding is wrong and ReSA is right.
  const stops = [
    { step: 221, rectified: false, about: "blocks-title", says: (view, moment) => `In a sparse step each KV head reads only `
      + `${attended(view, moment)} of ${moment.blocks} blocks, so the key and value that the step adds to the cache are a little wrong.` },
    { step: 224, rectified: false, about: "drift-title", says: ({ f }) => `The newest ${f} tokens of ReSA’s cache are all a little `
      + "wrong by now, the blue bars, and every step that reads them goes wrong a little more." },
    { step: 224, rectified: true, about: "drift-title", says: ({ f }) => `A dense pass has run these ${f} tokens through the model `
      + "once more: their bars are gone, while those of sparse decoding stay." },
  ];

  // ---- The recording ------------------------------------------------------------------------------------------------

  async function prepared(scene) {
    const steps = scene.text.length - 1; // the last token is only predicted
    const capacity = scene.prompt_tokens + steps;
    const dense = { read_share: 1, drift: Array(steps).fill(0), differs: {}, ...scene.dense };
    const settings = await Promise.all(scene.settings.map(async (setting) => {
      const ways = { dense, ...setting.ways };
      for (const [name, way] of Object.entries(ways)) ways[name] = { ...way, sums: sumsOf(way.loss, scene.loss_unit) };
      return { ways, lossTop: Math.max(4, ...Object.values(ways).map((way) => way.sums.at(-1))), bits: await unpacked(setting.selected) };
    }));
    const drifts = scene.settings.flatMap((setting) => Object.values(setting.ways).map((way) => Math.max(...way.drift)));
    const programs = scene.checks.length > 0;
    return { ...scene, steps, settings, programs, blocks: Math.ceil(capacity / b), rows: scene.layers.length * scene.kv_heads,
      driftTop: Math.max(...drifts) * data.drift_unit };
  }

  function sumsOf(loss, unit) {
    const sums = [0]; // after so many steps
    for (const value of loss) sums.push(sums.at(-1) + value * unit);
    return sums;
  }

  // A byte for every row, block and step; a bit in it for every way.
  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  // All that the controls choose. `shown` are the ways side by side.
  function currentView() {
    const scene = scenes[state.model], f = intervals[state.interval], name = `ReSA f=${f}`;
    const { ways, lossTop, bits } = scene.settings[state.ratio];
    const shown = [["dense", "dense"], ["sparse", "sparse"], ["resa", name], ["exact", "decode-only"]]
      .map(([kind, way]) => ({ kind, name: way, ...ways[way] }));
    return { scene, f, shown, lossTop, bits, resa: 1 << data.ways.indexOf(name), sparse: 1 << data.ways.indexOf("sparse"), frames: framesOf(scene.steps, f) };
  }

  // A rectification is a frame of its own, after the step that fills the window. So a reader sees the drift before it goes.
  // The one at the end is left out: nothing would read its cache.
  function framesOf(steps, f) {
    const frames = [{ step: 0, rectified: false }];
    for (let step = 1; step <= steps; step++) {
      frames.push({ step, rectified: false });
      if (step % f === 0 && step < steps) frames.push({ step, rectified: true });
    }
    return frames;
  }

  // All properties of a frame follow from its number. Tokens before `exact` are exact in ReSA's cache.
  function momentOf({ scene, f, frames }) {
    const { step, rectified } = frames[state.frame];
    const exact = rectified ? step : Math.floor(Math.max(step - 1, 0) / f) * f;
    const length = scene.prompt_tokens + step;
    return { step, rectified, exact, length, blocks: Math.ceil(length / b) };
  }

  // Whether a way, given as its bit, reads a block. Row = layer · KV heads + head.
  function reads({ scene, bits }, bit, step, row, block) {
    return step > 0 && (bits[(row * scene.blocks + block) * scene.steps + step - 1] & bit) > 0;
  }

  // How many rows of ReSA read a block.
  function readersOf(view, { step, rectified, blocks }, block) {
    if (rectified && block < blocks) return view.scene.rows;
    let readers = 0;
    for (let row = 0; row < view.scene.rows; row++) readers += reads(view, view.resa, step, row, block);
    return readers;
  }

  // How many blocks a row of ReSA reads: the same in every row.
  function attended(view, { step, blocks }) {
    let count = 0;
    for (let block = 0; block < blocks; block++) count += reads(view, view.resa, step, 0, block);
    return count;
  }

  // Where the drifted tokens of a way's cache begin.
  function firstDrifted(way, moment) {
    return { sparse: 0, resa: moment.exact }[way.kind] ?? moment.step;
  }

  function driftOf(way, moment) {
    return Math.max(0, ...way.drift.slice(firstDrifted(way, moment), moment.step)) * data.drift_unit;
  }

  // ---- Words and numbers --------------------------------------------------------------------------------------------

  function grouped(number) {
    return String(number).replace(/\B(?=(\d{3})+$)/g, ",");
  }

  // Write out white space, so that it can be quoted.
  function quoted(piece) {
    return piece.replaceAll("\n", "↵").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length)).trim();
  }

  function plural(count, noun) {
    return `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
  }

  function made(tag, text, className = "") {
    const found = document.createElement(tag);
    found.textContent = text;
    found.className = className;
    return found;
  }

  const code = (piece) => made("code", quoted(piece));
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function lossText(scene, loss) {
    return loss.toFixed(scene.programs ? 0 : 1).replace("-", "−");
  }

  function scoreOf(scene, way, step) {
    const checked = scene.checks.filter((check) => check < step).length, loss = way.sums[step];
    return scene.programs ? `${checked - loss} of ${checked}` : lossText(scene, loss);
  }

  // Over all texts, read to their ends.
  function meanOf(scene, way) {
    return scene.programs ? percent(1 - mean(way.losses) / mean(scene.checks_each)) : mean(way.losses).toFixed(1);
  }

  function likeliest(scene, way, step) {
    return way.differs[step - 1] ?? scene.likeliest[step - 1];
  }

  function showTable(view, moment) {
    const { scene, shown } = view, { step } = moment;
    element("score-name").textContent = scene.programs ? "values right" : "nats lost";
    element("mean-name").textContent = `mean of ${scene.texts} texts`;
    element("ways").replaceChildren(...shown.map((way) => {
      const row = document.createElement("tr");
      const head = made("th", "");
      head.scope = "row";
      head.append(made("i", "", `line ${way.kind}`), way.name);
      const next = made("td", "");
      if (step > 0) {
        const piece = likeliest(scene, way, step);
        next.append(code(piece), made("small", piece === scene.text[step] ? " ✓" : " ✗"));
      }
      const drifted = step - firstDrifted(way, moment);
      const numbers = [scoreOf(scene, way, step), meanOf(scene, way), driftOf(way, moment).toFixed(2), drifted, percent(way.read_share)];
      row.append(head, ...numbers.map((number) => made("td", number)), next);
      return row;
    }));
  }

  // Which stop the place shown is, or −1.
  function stopAt(view, { step, rectified }) {
    const isTour = state.model === 0 && view.f === 32 && ratios[state.ratio] === 0.1;
    return isTour ? stops.findIndex((stop) => stop.step === step && stop.rectified === rectified) : -1;
  }

  function showTour(view, moment) {
    const at = stopAt(view, moment);
    document.querySelectorAll(".stop").forEach((button, index) => button.setAttribute("aria-pressed", index === at));
    for (const { about } of stops) element(about).parentElement.classList.toggle("pointed-at", stops[at]?.about === about);
    element("tour").textContent = at < 0 ? "Three stops show what happens, one sentence each." : stops[at].says(view, moment);
  }

  function showState(view, moment) {
    const { scene, shown, f } = view, { step } = moment;
    if (step === 0) {
      element("state").replaceChildren(`The first ${plural(scene.prompt_tokens, "token")} are cached and encoded densely, for every way alike.`);
    } else if (moment.rectified) {
      const before = Math.max(...shown[2].drift.slice(step - f, step)) * data.drift_unit;
      element("state").replaceChildren(`Rectification: the newest ${f} tokens of ReSA’s cache run through the model again, densely. `
        + `Their drift was ${before.toFixed(2)} and is gone.`);
    } else {
      element("state").replaceChildren(`Step ${step} of ${scene.steps}: `, code(scene.text[step - 1]), ` is fed at position ${grouped(moment.length - 1)}. `
        + `Each KV head reads ${attended(view, moment)} of ${moment.blocks} blocks. The text goes on with `, code(scene.text[step]), ".");
    }
  }

  // What drift has cost: what a way loses more than decode-only, whose loss is step error alone.
  function showVerdict({ scene, shown }, { step }) {
    const [, sparse, resa, exact] = shown;
    const unit = scene.programs ? "values" : "nats";
    const costs = [sparse, resa].map((way) => lossText(scene, way.sums[step] - exact.sums[step]));
    const means = [sparse, resa].map((way) => (mean(way.losses) - mean(exact.losses)).toFixed(1).replace("-", "−"));
    element("verdict").replaceChildren("More than with an exact cache: sparse ", made("b", costs[0]), ", ReSA ", made("b", costs[1]),
      ` ${unit}. Mean of ${scene.texts} whole texts: ${means[0]} and ${means[1]}.`);
  }

  function showInspected(view, moment) {
    const { scene } = view, block = state.lookedAt;
    const line = element("inspected"), canvas = element("blocks");
    canvas.setAttribute("aria-valuemax", moment.blocks - 1);
    canvas.setAttribute("aria-valuenow", block ?? moment.blocks - 1);
    if (block === null) {
      line.textContent = "Point at a block or use the arrow keys to read it.";
    } else {
      const first = block * b, end = Math.min(first + b, moment.length);
      const text = [...scene.prompt, ...scene.text].slice(first, end).map((piece) => piece.replace(/\s+/g, " ")).join("");
      line.replaceChildren(`Block ${block}, tokens ${grouped(first)}–${grouped(end - 1)}, read by ${readersOf(view, moment, block)} of ${scene.rows}: `,
        made("code", text.trim()));
    }
    canvas.setAttribute("aria-valuetext", line.textContent);
  }

  // ---- The text -----------------------------------------------------------------------------------------------------

  // One span per block. Decoded tokens have spans of their own, and asserted values have room for marks.
  function buildText(scene) {
    const pieces = [...scene.prompt, ...scene.text], spans = [];
    for (let first = 0; first < pieces.length; first += b) {
      const span = made("span", "", "block");
      pieces.slice(first, first + b).forEach((piece, offset) => {
        const token = first + offset - scene.prompt_tokens;
        span.append(token < 0 ? piece : made("span", piece, piece.includes("\n") ? "token newline" : "token"));
        if (scene.checks.includes(token - 1)) span.append(made("span", "", "marks"));
      });
      spans.push(span);
    }
    element("text").firstElementChild.replaceChildren(...spans);
  }

  function showText(view, moment) {
    const box = element("text"), { scene, shown } = view;
    box.querySelectorAll(".block").forEach((span, block) => {
      span.style.setProperty("--readers", (moment.rectified ? 0 : readersOf(view, moment, block) / scene.rows).toFixed(3));
      span.classList.toggle("looked-at", block === state.lookedAt);
    });
    box.querySelectorAll(".token").forEach((span, index) => {
      span.hidden = index > moment.step;
      span.classList.toggle("pending", index === moment.step);
      span.classList.toggle("current", index === moment.step - 1);
      span.classList.toggle("drifted", index >= moment.exact && index < moment.step);
    });
    box.querySelectorAll(".marks").forEach((span, index) => {
      const check = scene.checks[index];
      const marks = check < moment.step ? shown.slice(0, 3) : [];
      span.replaceChildren(...marks.map((way) => made("b", way.loss[check] ? "✗" : "✓", `mark ${way.kind}`)));
    });
  }

  // Scroll inside the box only, so that the page never jumps.
  function followText(moment) {
    const box = element("text");
    const token = box.querySelectorAll(".token")[moment.step];
    box.scrollTop = token.offsetTop + token.offsetHeight - box.clientHeight * 0.86;
  }

  // ---- Pictures -----------------------------------------------------------------------------------------------------

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const lineColour = (kind) => colour(kind === "dense" ? "muted" : kind);
  const dashes = { dense: [], sparse: [], resa: [7, 3], exact: [1.5, 3] };
  const isNarrow = () => element("blocks").clientWidth < 500;
  const gutter = () => isNarrow() ? 26 : 34; // left of every picture, for its labels
  const margin = () => isNarrow() ? 60 : 72; // right of a picture by token, for the names of ways

  // Clear a canvas of so many CSS pixels, sharp on any screen.
  function surface(id, height) {
    const canvas = element(id);
    const scale = devicePixelRatio || 1;
    const width = canvas.clientWidth;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.font = `${isNarrow() ? 9 : 10.5}px system-ui, "DejaVu Sans", sans-serif`;
    context.textBaseline = "middle";
    const left = gutter();
    return { context, left, width: width - left - 1 };
  }

  function label(context, text, x, y, align = "center", style = colour("muted")) {
    context.textAlign = align;
    context.fillStyle = style;
    context.fillText(text, x, y);
  }

  function fill(context, style, box) {
    context.fillStyle = style;
    context.fillRect(...box);
  }

  function stroke(context, style, width, points, dash = []) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.setLineDash(dash);
    context.beginPath();
    points.forEach(([x, y], index) => index ? context.lineTo(x, y) : context.moveTo(x, y));
    context.stroke();
    context.setLineDash([]);
  }

  // The x axis of the pictures by token: one column per token that was fed.
  function tokenColumns(scene, left, width) {
    const column = (width - margin()) / scene.steps;
    return { column, right: left + width - margin(), at: (token) => left + token * column, thick: Math.max(column - (column > 4 ? 1.25 : column > 2 ? 0.5 : 0), 1) };
  }

  function drawTokenAxis(context, scene, columns, y) {
    const tick = scene.steps / (isNarrow() ? 4 : 8);
    for (let token = tick; token <= scene.steps; token += tick) label(context, String(token), columns.at(token - 0.5), y);
    label(context, "token", 0, y, "left");
  }

  function drawGrid(context, left, right, values, y) {
    for (const value of values) {
      const at = Math.round(y(value)) + 0.5;
      stroke(context, colour("line"), 1, [[left, at], [right, at]]);
      label(context, String(value), left - 6, y(value), "right");
    }
  }

  function drawMarks(context, { f }, moment, columns, height) {
    const style = colour("exact");
    context.globalAlpha = Math.min(1, f * columns.column / 16); // faint where they are many
    for (let end = f; end <= moment.exact; end += f) {
      const x = columns.at(end) - 0.5;
      stroke(context, style, 1, [[x, 0], [x, height]], [3, 2.5]);
    }
    context.globalAlpha = 1;
  }

  function drawCurrent(context, columns, moment, y) {
    const x = columns.at(moment.step - 0.5);
    context.fillStyle = colour("ink");
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x - 4, y + 6);
    context.lineTo(x + 4, y + 6);
    if (moment.step) context.fill();
  }

  // About three round numbers up to the top.
  function gridValues(top) {
    const power = 10 ** Math.floor(Math.log10(top / 3));
    const gap = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => top / candidate <= 4);
    return Array.from({ length: Math.floor(top / gap) + 1 }, (_, index) => Number((index * gap).toPrecision(6)));
  }

  function drawLoss(view, moment) {
    const { scene, shown, lossTop } = view, { step } = moment;
    const height = isNarrow() ? 130 : 165, lane = 13;
    const lanes = scene.programs ? shown.length * lane + 12 : 0;
    const { context, left, width } = surface("loss", height + lanes + 22);
    const columns = tokenColumns(scene, left, width);
    const y = (value) => height - 2 - (value / lossTop) * (height - 12);
    drawGrid(context, left, columns.right, gridValues(lossTop), y);
    drawMarks(context, view, moment, columns, height + lanes);
    for (const way of shown) {
      const points = way.sums.slice(0, step + 1).map((sum, index) => [columns.at(index), y(sum)]);
      stroke(context, lineColour(way.kind), way.kind === "dense" ? 1.5 : 2.25, points, dashes[way.kind]);
    }
    drawNames(context, shown, columns.at(step) + 5, (way) => y(way.sums[step]), height - 4);
    if (scene.programs) shown.forEach((way, index) => drawLane(context, scene, way, step, columns, height + 12 + (index + 0.5) * lane));
    drawCurrent(context, columns, moment, height + lanes + 1);
    drawTokenAxis(context, scene, columns, height + lanes + 15);
    const sums = shown.map((way) => `${way.name} ${lossText(scene, way.sums[step])}`).join(", ");
    element("loss").setAttribute("aria-label", `${scene.programs ? "Wrong values" : "Nats lost"} after ${plural(step, "token")}: ${sums}.`);
  }

  const shortNames = { dense: "dense", sparse: "sparse", resa: "ReSA", exact: "decode-only" };

  // Name the lines where they end, from the lowest up, each at least a line above the one below.
  function drawNames(context, shown, x, y, lowest) {
    let free = lowest;
    for (const way of [...shown].sort((one, other) => y(other) - y(one))) {
      const at = Math.min(y(way), free);
      label(context, shortNames[way.kind], x, at, "left", lineColour(way.kind));
      free = at - 11;
    }
  }

  // A tick or a cross for every asserted value.
  function drawLane(context, scene, way, step, columns, y) {
    const style = lineColour(way.kind), muted = colour("muted"), r = isNarrow() ? 2 : 2.75;
    for (const check of scene.checks.filter((each) => each < step)) {
      const x = columns.at(check + 0.5);
      if (way.loss[check]) {
        stroke(context, style, 2, [[x - r, y - r], [x + r, y + r]]);
        stroke(context, style, 2, [[x - r, y + r], [x + r, y - r]]);
      } else {
        stroke(context, muted, 1, [[x - r, y], [x - r / 3, y + r], [x + r, y - r]]);
      }
    }
    label(context, shortNames[way.kind], columns.right + 5, y, "left", style);
  }

  function drawDrift(view, moment) {
    const { scene } = view, lane = isNarrow() ? 44 : 54, gap = 8;
    const ways = view.shown.slice(1, 3), bottom = ways.length * (lane + gap) - gap;
    const { context, left, width } = surface("drift", bottom + 22);
    const columns = tokenColumns(scene, left, width), ghost = colour("ghost");
    ways.forEach((way, index) => {
      const floor = index * (lane + gap) + lane - 1, style = colour(way.kind);
      const height = (value) => (value / scene.driftTop) * (lane - 6);
      drawGrid(context, left, columns.right, [0, 1], (value) => floor - height(value));
      const exact = firstDrifted(way, moment);
      for (let token = 0; token < moment.step; token++) {
        const x = columns.at(token), high = height(way.drift[token] * data.drift_unit);
        if (token < exact) fill(context, ghost, [x, floor - high, columns.thick, 1.5]);
        else fill(context, style, [x, floor - high, columns.thick, high]);
      }
      label(context, shortNames[way.kind], columns.right + 5, floor - lane / 2, "left", style);
    });
    drawMarks(context, view, moment, columns, bottom);
    drawCurrent(context, columns, moment, bottom + 1);
    drawTokenAxis(context, scene, columns, bottom + 15);
    const texts = ways.map((way) => `${way.name}: ${plural(moment.step - firstDrifted(way, moment), "drifted token")}, largest drift ${driftOf(way, moment).toFixed(2)}`);
    element("drift").setAttribute("aria-label", `Drift of the cache. ${texts.join(". ")}.`);
  }

  function drawBlocks(view, moment) {
    const { scene } = view, row = isNarrow() ? 6 : 7, layer = row * scene.kv_heads + 2.5;
    const bottom = layer * scene.layers.length;
    const { context, left, width } = surface("blocks", bottom + 16);
    const cell = width / scene.blocks;
    const firstLocal = moment.blocks - data.config.local_blocks;
    const firstWritten = Math.floor((moment.length - view.f) / b);
    const names = ["unread", "resa", "local", "exact", "sparse"];
    const palette = Object.fromEntries(names.map((name) => [name, colour(name)]));
    for (let each = 0; each < scene.rows; each++) {
      const y = Math.floor(each / scene.kv_heads) * layer + (each % scene.kv_heads) * row;
      for (let block = 0; block < moment.blocks; block++) {
        const box = [left + block * cell, y, cell - (cell > 6 ? 1.5 : 1), row - 1];
        const [resa, sparse] = [view.resa, view.sparse].map((bit) => reads(view, bit, moment.step, each, block));
        if (moment.rectified) drawDense(context, palette, box, block >= firstWritten);
        else if (moment.step && block >= firstLocal) drawFrame(context, palette.local, box);
        else fill(context, resa ? palette.resa : palette.unread, box);
        const middle = [box[0] + box[2] * 0.3, y + box[3] * 0.3, box[2] * 0.4, box[3] * 0.4];
        if (sparse && !resa && !moment.rectified) fill(context, palette.sparse, middle);
      }
    }
    drawBlockLabels(context, scene, left, cell, layer, bottom);
    if (state.lookedAt === null) return;
    context.strokeStyle = colour("ink");
    context.lineWidth = 1.5;
    context.strokeRect(left + state.lookedAt * cell - 1.25, 0.75, cell + 1, bottom - 2.5);
  }

  function drawFrame(context, style, [x, y, width, height]) {
    const line = width > 6 ? 2 : 1.25;
    context.strokeStyle = style;
    context.lineWidth = line;
    context.strokeRect(x + line / 2, y + line / 2, width - line, height - line);
  }

  // A stripe marks a block that the dense pass reads. A full cell marks a block that it writes anew.
  function drawDense(context, palette, [x, y, width, height], isRewritten) {
    fill(context, palette.unread, [x, y, width, height]);
    fill(context, palette.exact, isRewritten ? [x, y, width, height] : [x, y + height * 0.3, width, height * 0.4]);
  }

  function drawBlockLabels(context, scene, left, cell, layer, bottom) {
    scene.layers.forEach((number, index) => label(context, String(number), left - 6, (index + 0.5) * layer - 1, "right"));
    const boundary = left + (scene.prompt_tokens / b) * cell - 0.75, y = bottom + 7;
    label(context, "layer", 0, y, "left");
    const tick = 8 * Math.ceil(4 / cell);
    for (let block = tick, x; (x = left + (block + 0.5) * cell) < boundary - 50; block += tick) label(context, String(block), x, y);
    stroke(context, colour("muted"), 1, [[boundary, 0], [boundary, bottom + 16]]);
    label(context, "prompt", boundary - 5, y, "right");
    label(context, isNarrow() ? "new" : "decoded", boundary + 5, y, "left");
  }

  // ---- Showing and moving -------------------------------------------------------------------------------------------

  function drawPictures() {
    const view = currentView(), moment = momentOf(view);
    drawLoss(view, moment);
    drawDrift(view, moment);
    drawBlocks(view, moment);
  }

  function show() {
    const view = currentView(), moment = momentOf(view);
    if (state.lookedAt !== null) state.lookedAt = Math.min(state.lookedAt, moment.blocks - 1);
    document.body.toggleAttribute("data-rectified", moment.rectified);
    document.body.toggleAttribute("data-programs", view.scene.programs);
    showControls(view, moment);
    showTour(view, moment);
    showState(view, moment);
    showTable(view, moment);
    showVerdict(view, moment);
    showText(view, moment);
    showInspected(view, moment);
    drawPictures();
    return moment;
  }

  function showControls({ scene, f, frames }, moment) {
    const last = frames.length - 1;
    const scrub = element("scrub");
    scrub.max = last;
    scrub.value = state.frame;
    scrub.setAttribute("aria-valuetext", moment.rectified ? `rectification after step ${moment.step}` : `step ${moment.step} of ${scene.steps}`);
    element("back").disabled = state.frame === 0;
    element("forward").disabled = state.frame === last;
    const play = element("play");
    play.toggleAttribute("data-playing", state.playing);
    play.setAttribute("aria-label", state.playing ? "Pause" : "Play");
    // A screen reader announces single steps, and not the hundreds that play by.
    element("state").setAttribute("aria-live", state.playing ? "off" : "polite");
    for (const radio of document.querySelectorAll("[name=model]")) radio.checked = radio.value === scene.model;
    showSetting("interval", intervals, `every ${f} tokens`);
    showSetting("ratio", ratios, String(ratios[state.ratio]));
  }

  function showSetting(id, stops, text) {
    element(id).max = stops.length - 1;
    element(id).value = state[id];
    element(id).setAttribute("aria-valuetext", text);
    element(`${id}-value`).textContent = text;
  }

  const lastFrame = () => currentView().frames.length - 1;

  function goTo(frame) {
    state.frame = Math.max(0, Math.min(frame, lastFrame()));
    followText(show());
  }

  let timer = null;

  function setPlaying(playing) {
    clearTimeout(timer);
    state.playing = playing;
    if (!playing) return show();
    goTo(state.frame === lastFrame() ? 0 : state.frame + 1);
    timer = setTimeout(advance, delay());
  }

  function advance() {
    if (state.frame === lastFrame()) return setPlaying(false);
    goTo(state.frame + 1);
    timer = setTimeout(advance, delay());
  }

  // A rectification stays long enough to be seen, at any speed.
  function delay() {
    const pause = 1000 / Number(element("speed").value);
    return currentView().frames[state.frame].rectified ? Math.max(pause, 700) : pause;
  }

  function stepBy(count) {
    setPlaying(false);
    goTo(state.frame + count);
  }

  // Keep the step under another setting. If that setting rectifies there, keep the rectification too. Another model reads
  // another text, which is shown as a whole.
  function choose(change) {
    const { step, rectified } = currentView().frames[state.frame];
    const isOther = change.model !== undefined && change.model !== state.model;
    Object.assign(state, change);
    if (isOther) openScene();
    else goTo(frameAt(step, rectified));
  }

  function visit({ step, rectified, about }) {
    setPlaying(false);
    choose({ model: 0, interval: intervals.indexOf(32), ratio: ratios.indexOf(0.1) });
    goTo(frameAt(step, rectified));
    element(about).parentElement.scrollIntoView({ block: "nearest" });
  }

  function openScene() {
    const { scene } = currentView();
    buildText(scene);
    element("loss-unit").textContent = scene.programs ? "asserted values that are wrong, a tick or a cross for each" : "KL from dense, summed over the tokens, in nats";
    element("blocks-rows").textContent = `one row per KV head in ${scene.layers.length} of ${scene.n_layers} layers, one column per ${b} tokens`;
    const what = scene.programs
      ? `The shipped model that carries values reads a program that assigns names to names. Of ${scene.texts} programs, number ${scene.chosen + 1} is shown: `
      : `SmolLM2-135M-Instruct reads English from Python’s own documentation. Of ${scene.texts} texts, number ${scene.chosen + 1} is shown: `;
    element("source").replaceChildren(what, "the one whose loss is made up most nearly as on average. Every number was recorded by ",
      made("code", data.command), " from weights ", made("code", scene.sha256.slice(0, 12)),
      `. Schedule “${data.config.schedule}”, block size ${b}, at least ${data.config.min_blocks} blocks. Bytes read follow from the cost model.`);
    goTo(Infinity);
  }

  function frameAt(step, rectified) {
    const { frames } = currentView();
    const found = frames.findIndex((frame) => frame.step === step && frame.rectified === rectified);
    return found < 0 ? frames.findIndex((frame) => frame.step === step) : found;
  }

  // ---- Hands on -----------------------------------------------------------------------------------------------------

  function lookAt(block) {
    const { blocks } = momentOf(currentView());
    state.lookedAt = block === null ? null : Math.max(0, Math.min(block, blocks - 1));
    show();
  }

  function blockUnder(event) {
    const view = currentView(), left = gutter();
    const block = Math.floor((event.offsetX - left) / ((element("blocks").clientWidth - left - 1) / view.scene.blocks));
    return block < 0 || block >= momentOf(view).blocks ? null : block;
  }

  function onBlocksKey(event) {
    const { blocks } = momentOf(currentView());
    const now = state.lookedAt ?? blocks - 1;
    const targets = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1, Home: 0, End: blocks - 1 };
    if (!(event.key in targets)) return;
    event.preventDefault();
    lookAt(targets[event.key]);
  }

  // The focused element keeps its own keys: arrows move a slider, space presses a button.
  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const focused = (selector) => event.target.closest?.(selector);
    const actions = { ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1), Home: () => stepBy(-Infinity), End: () => stepBy(Infinity) };
    if (event.key === " " && !focused("button, select, a, [type=radio]")) {
      event.preventDefault();
      if (!event.repeat) setPlaying(!state.playing);
    } else if (event.key in actions && !focused("input, select, #blocks")) {
      event.preventDefault();
      actions[event.key]();
    }
  }

  function listen() {
    document.querySelectorAll(".stop").forEach((button, index) => button.addEventListener("click", () => visit(stops[index])));
    element("play").addEventListener("click", () => setPlaying(!state.playing));
    element("back").addEventListener("click", () => stepBy(-1));
    element("forward").addEventListener("click", () => stepBy(1));
    element("scrub").addEventListener("input", (event) => stepBy(event.target.valueAsNumber - state.frame));
    for (const id of ["interval", "ratio"]) {
      element(id).addEventListener("input", (event) => choose({ [id]: event.target.valueAsNumber }));
    }
    for (const radio of document.querySelectorAll("[name=model]")) {
      radio.addEventListener("change", () => choose({ model: modelNamed(radio.value) }));
    }
    const blocks = element("blocks");
    for (const kind of ["pointermove", "pointerdown"]) blocks.addEventListener(kind, (event) => lookAt(blockUnder(event)));
    blocks.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && lookAt(null));
    blocks.addEventListener("blur", () => lookAt(null));
    blocks.addEventListener("keydown", onBlocksKey);
    document.addEventListener("keydown", onKey);
    addEventListener("hashchange", readAddress);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPictures);
    new ResizeObserver(drawPictures).observe(element("blocks").parentElement);
  }

  function buildStops(id, texts) {
    element(id).replaceChildren(...texts.map((text, index) => {
      const span = made("span", text);
      span.style.left = `${(index / (texts.length - 1)) * 100}%`;
      return span;
    }));
  }

  const modelNamed = (name) => scenes.findIndex((scene) => scene.model === name);

  // Links to a place: index.html#model=carrying&interval=8&ratio=0.05&step=40, and &rectified for the rectification after
  // that step. Without a step it is the end, and without anything the first stop.
  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const places = { model: modelNamed(asked.get("model")), interval: intervals.indexOf(Number(asked.get("interval"))),
      ratio: ratios.indexOf(Number(asked.get("ratio"))) };
    for (const [name, place] of Object.entries(places)) if (place >= 0) state[name] = place;
    state.frame = 0;
    setPlaying(false);
    openScene();
    const step = parseInt(asked.get("step"), 10);
    if (step >= 0) goTo(frameAt(Math.min(step, currentView().scene.steps), asked.has("rectified")));
    if (asked.size === 0) goTo(frameAt(stops[0].step, stops[0].rectified));
  }

  buildStops("interval-stops", intervals);
  buildStops("ratio-stops", ratios);
  listen();
  readAddress();
  document.body.dataset.ready = "";
})();
