// Draws the recording of `python docs/record_play.py`. The page itself computes only counts, largest values and numbers
// that follow from a step's number. It needs no library and no network, so it also opens from a disk.
(() => {
  "use strict";

  const data = globalThis.RESA_PLAY;
  const b = data.config.block_size;
  const rows = data.layers * data.kv_heads;
  const steps = data.settings[0].drift.length; // the last token chosen is never fed
  const capacity = data.prompt.length + steps;
  const allBlocks = Math.ceil(capacity / b);
  const intervals = distinct(data.settings.map((setting) => setting.interval));
  const ratios = distinct(data.settings.map((setting) => setting.ratio));
  const settings = new Map(data.settings.map((setting) => [`${setting.interval} ${setting.ratio}`, prepared(setting)]));
  const driftTop = Math.max(...[...settings.values()].map((setting) => setting.largest[steps]));
  const element = (id) => document.getElementById(id);
  const wantsStillness = matchMedia("(prefers-reduced-motion: reduce)");

  // The place shown. `frame` counts steps and rectifications. `wiped` is the drawn share of a rectification.
  const state = { interval: intervals.indexOf(32), ratio: ratios.indexOf(0.1), frame: 0, playing: false, lookedAt: null, wiped: 1 };

  // ---- The recording ------------------------------------------------------------------------------------------------

  function distinct(values) {
    return [...new Set(values)];
  }

  function prepared(setting) {
    const drift = setting.drift.map((layers) => layers.map((value) => value * data.drift_unit)); // [step][layer]
    const ofToken = drift.map((layers) => Math.max(...layers));
    const largest = [0]; // after so many steps
    for (const value of ofToken) largest.push(Math.max(largest.at(-1), value));
    const selected = unpacked(setting.selected);
    const parts = setting.tokens.findIndex((token, index) => token !== data.dense[index]);
    return { ...setting, drift, ofToken, largest, selected, parts, frames: framesOf(setting.interval) };
  }

  // The file holds lengths of runs, of unselected and selected in turn: row by row, block by block, step after step.
  function unpacked(runs) {
    const digits = Array.from(runs, (character) => data.digits.indexOf(character)); // −1 for the tilde of a long run
    const lengths = [];
    for (let i = 0; i < digits.length; i++) {
      if (digits[i] >= 0) lengths.push(digits[i]);
      else lengths.push(digits[++i] * data.digits.length + digits[++i]);
    }
    const bits = new Uint8Array(lengths.reduce((sum, length) => sum + length, 0));
    let end = 0;
    lengths.forEach((length, index) => bits.fill(index & 1, end, (end += length)));
    return bits;
  }

  // A rectification is a frame of its own, after the step that fills the window. So a reader sees the drift before it goes.
  function framesOf(interval) {
    const frames = [{ step: 0, rectified: false }];
    for (let step = 1; step <= steps; step++) {
      frames.push({ step, rectified: false });
      if (interval !== null && step % interval === 0) frames.push({ step, rectified: true });
    }
    return frames;
  }

  function currentSetting() {
    return settings.get(`${intervals[state.interval]} ${ratios[state.ratio]}`);
  }

  // Row = layer · KV heads + head.
  function isSelected(setting, step, row, block) {
    const blocks = setting.selected.length / (steps * rows);
    return setting.selected[(row * blocks + block) * steps + step - 1];
  }

  function readersOf(setting, moment, block) {
    if (moment.step === 0 || block >= moment.blocks) return 0;
    if (moment.rectified) return rows;
    let readers = 0;
    for (let row = 0; row < rows; row++) readers += isSelected(setting, moment.step, row, block);
    return readers;
  }

  function attended(setting, moment) {
    if (moment.step === 0) return 0;
    if (moment.rectified) return moment.blocks;
    let count = 0;
    for (let block = 0; block < moment.blocks; block++) count += isSelected(setting, moment.step, 0, block);
    return count; // the same in every row
  }

  // All properties of a frame follow from its number.
  function momentOf(setting, frame) {
    const { step, rectified } = setting.frames[frame];
    const f = setting.interval;
    const exact = f === null || step === 0 ? 0 : (rectified ? step : Math.floor((step - 1) / f) * f);
    const length = data.prompt.length + step;
    const moment = { step, rectified, exact, window: step - exact, length, blocks: Math.ceil(length / b) };
    return { ...moment, attended: attended(setting, moment), drift: driftOf(setting, moment) };
  }

  // The largest over the tokens of the open window and, up to rounding, the rectified ones.
  function driftOf(setting, moment) {
    const open = setting.ofToken.slice(moment.exact, moment.step);
    const closed = setting.rectified.slice(0, moment.exact / (setting.interval ?? 1));
    return Math.max(0, ...open, ...closed);
  }

  // ---- Words and numbers --------------------------------------------------------------------------------------------

  function grouped(number) {
    return String(number).replace(/\B(?=(\d{3})+$)/g, ",");
  }

  function driftText(value) {
    if (value === 0) return "0";
    if (value >= 1e-3) return value.toFixed(3);
    const exponent = Math.floor(Math.log10(value));
    const digits = [...String(-exponent)].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("");
    return `${(value / 10 ** exponent).toFixed(1)}·10⁻${digits}`;
  }

  function intervalText(interval) {
    return interval === null ? "never" : `every ${interval} tokens`;
  }

  // Write out white space, so that it can be quoted.
  function quoted(piece) {
    return piece.replaceAll("\n", "↵").replace(/^ +$/, (spaces) => "␣".repeat(spaces.length)).trimEnd();
  }

  function plural(count, noun) {
    return `${grouped(count)} ${noun}${count === 1 ? "" : "s"}`;
  }

  function showNumbers(setting, moment) {
    const { interval, ratio } = setting;
    const shown = {
      "n-step": moment.step,
      "n-steps": `of ${steps}`,
      "n-window": moment.window,
      "n-interval": interval === null ? "" : `of ${interval}`,
      "n-length": grouped(moment.length),
      "n-blocks": moment.blocks,
      "n-attended": moment.step === 0 ? "–" : moment.attended,
      "n-share": `${(setting.read_share * 100).toFixed(1)} %`,
      "n-formula": `1/b + p${interval === null ? "" : " + 1/f"} of dense`,
      "n-terms": `= 1/${b} + ${ratio}${interval === null ? "" : ` + 1/${interval}`}`,
      "n-drift": driftText(moment.drift),
      "n-largest": driftText(setting.largest[moment.step]),
    };
    for (const [id, text] of Object.entries(shown)) element(id).textContent = text;
  }

  // A line of text with `code` in it, without ever parsing recorded text as HTML.
  function write(target, ...parts) {
    target.replaceChildren(...parts.map((part) => {
      if (typeof part === "string") return part;
      const code = document.createElement("code");
      code.textContent = part.code;
      return code;
    }));
  }

  function showState(setting, moment) {
    const line = element("state");
    const { step } = moment;
    if (step === 0) {
      write(line, `The prompt’s ${plural(data.prompt.length, "token")} are cached and encoded densely. The first token is chosen.`);
    } else if (moment.rectified) {
      const before = Math.max(...setting.ofToken.slice(step - setting.interval, step));
      write(line, `Rectification: the newest ${setting.interval} tokens run through the model again, densely. `
        + `Drift ${driftText(before)} → ${driftText(moment.drift)}.`);
    } else {
      write(line, `Step ${step}: `, { code: quoted(setting.tokens[step - 1]) }, ` is fed at position ${grouped(moment.length - 1)}. `
        + `Each KV head reads ${moment.attended} of ${moment.blocks} blocks, and `, { code: quoted(setting.tokens[step]) }, " comes next.");
    }
  }

  function showParting(setting, moment) {
    const { parts } = setting;
    const line = element("parting");
    if (parts < 0 || moment.step < parts) {
      write(line, "The text so far agrees with dense decoding.");
    } else {
      write(line, `The first ${plural(parts, "token")} agree with dense decoding. Then dense decoding writes `,
        { code: quoted(data.dense[parts]) }, ", and this setting writes ", { code: quoted(setting.tokens[parts]) }, ".");
    }
  }

  function showInspected(setting, moment) {
    const block = state.lookedAt;
    const line = element("inspected");
    const canvas = element("blocks");
    canvas.setAttribute("aria-valuemax", moment.blocks - 1);
    canvas.setAttribute("aria-valuenow", block ?? moment.blocks - 1);
    if (block === null) {
      write(line, "Point at a block or use the arrow keys to read it.");
    } else {
      const first = block * b, end = Math.min(first + b, moment.length);
      const text = [...data.prompt, ...setting.tokens].slice(first, end).map((piece) => piece.replace(/\s+/g, " ")).join("");
      write(line, `Block ${block}, tokens ${grouped(first)}–${grouped(end - 1)}, read by ${readersOf(setting, moment, block)} of ${rows}: `,
        { code: text.trim() });
    }
    canvas.setAttribute("aria-valuetext", line.textContent);
  }

  // ---- The text -----------------------------------------------------------------------------------------------------

  // One span per block. Generated blocks have one span per token. Another text makes them anew.
  function buildText(setting) {
    const pieces = [...data.prompt, ...setting.tokens];
    const spans = [];
    for (let first = 0; first < pieces.length; first += b) {
      const span = document.createElement("span");
      span.className = "block";
      span.dataset.block = spans.length;
      pieces.slice(first, first + b).forEach((piece, offset) => {
        const index = first + offset - data.prompt.length;
        span.append(index < 0 ? piece : tokenSpan(piece, index === setting.parts));
      });
      spans.push(span);
    }
    element("text").firstElementChild.replaceChildren(...spans);
  }

  function tokenSpan(piece, isFork) {
    const span = document.createElement("span");
    span.className = "token";
    span.classList.toggle("newline", piece.includes("\n"));
    span.classList.toggle("fork", isFork);
    span.textContent = piece;
    return span;
  }

  function showText(setting, moment) {
    const box = element("text");
    box.querySelectorAll(".block").forEach((span, block) => {
      span.style.setProperty("--readers", (moment.rectified ? 0 : readersOf(setting, moment, block) / rows).toFixed(3));
      span.classList.toggle("looked-at", block === state.lookedAt);
    });
    box.querySelectorAll(".token").forEach((span, index) => {
      span.hidden = index > moment.step;
      span.classList.toggle("pending", index === moment.step);
      span.classList.toggle("current", index === moment.step - 1);
      span.classList.toggle("drifted", index >= moment.exact && index < moment.step);
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
  const isNarrow = () => element("blocks").clientWidth < 500;
  const gutter = () => isNarrow() ? 26 : 34; // left of every picture, for its labels

  // Clear a canvas of so many CSS pixels, sharp on any screen, and draw the frame that all pictures share.
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
    return { context, left, width: width - left - 1, height };
  }

  function label(context, text, x, y, align = "center") {
    context.textAlign = align;
    context.fillStyle = colour("muted");
    context.fillText(text, x, y);
  }

  function blockLayout() {
    const row = isNarrow() ? 6 : 7;
    const layer = row * data.kv_heads + 2.5;
    return { row, layer, height: layer * data.layers, axis: 16 };
  }

  const rowTop = (layout, row) => Math.floor(row / data.kv_heads) * layout.layer + (row % data.kv_heads) * layout.row;

  function drawBlocks(setting, moment) {
    const layout = blockLayout();
    const { context, left, width } = surface("blocks", layout.height + layout.axis);
    const cell = width / allBlocks;
    const firstLocal = moment.blocks - data.config.local_blocks;
    const firstWritten = Math.floor((moment.length - (setting.interval ?? 0)) / b);
    const palette = { unread: colour("unread"), selected: colour("selected"), local: colour("local"), rectified: colour("rectified") };
    for (let row = 0; row < rows; row++) {
      const y = rowTop(layout, row);
      for (let block = 0; block < moment.blocks; block++) {
        const box = [left + block * cell, y, cell - (cell > 6 ? 1.5 : 1), layout.row - 1];
        if (moment.step === 0) fill(context, palette.unread, box);
        else if (moment.rectified) drawDense(context, palette, box, block >= firstWritten);
        else if (block >= firstLocal) drawFrame(context, palette.local, box);
        else fill(context, isSelected(setting, moment.step, row, block) ? palette.selected : palette.unread, box);
      }
    }
    drawBlockLabels(context, left, cell, layout);
    if (state.lookedAt !== null) {
      context.strokeStyle = colour("ink");
      context.lineWidth = 1.5;
      context.strokeRect(left + state.lookedAt * cell - 1.25, 0.75, cell + 1, layout.height - 2.5);
    }
  }

  function fill(context, style, box) {
    context.fillStyle = style;
    context.fillRect(...box);
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
    fill(context, palette.rectified, isRewritten ? [x, y, width, height] : [x, y + height * 0.3, width, height * 0.4]);
  }

  function drawBlockLabels(context, left, cell, layout) {
    for (let layer = 0; layer < data.layers; layer++) {
      label(context, String(layer), left - 6, layer * layout.layer + layout.layer / 2 - 1, "right");
    }
    const boundary = left + (data.prompt.length / b) * cell - 0.75;
    const y = layout.height + 7;
    label(context, "layer", 0, y, "left");
    const tick = isNarrow() ? 16 : 8;
    for (let block = tick; (block + tick / 2) * b < data.prompt.length; block += tick) {
      label(context, String(block), left + (block + 0.5) * cell, y);
    }
    context.strokeStyle = colour("muted");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(boundary, 0);
    context.lineTo(boundary, layout.height + layout.axis);
    context.stroke();
    label(context, "prompt", boundary - 5, y, "right");
    label(context, "written", boundary + 5, y, "left");
  }

  // The x axis of the two lower pictures: one column per token that was written and fed.
  function tokenColumns(left, width) {
    const column = width / steps;
    return { column, at: (token) => left + token * column, thick: Math.max(column - (column > 4 ? 1.25 : 0.75), 1) };
  }

  function drawTokenAxis(context, columns, y) {
    const tick = isNarrow() ? 32 : 16;
    for (let token = tick; token <= steps; token += tick) label(context, String(token), columns.at(token - 0.5), y);
    label(context, "token", 0, y, "left");
  }

  function drawMarks(context, setting, moment, columns, height) {
    context.strokeStyle = colour("rectified");
    context.lineWidth = 1.25;
    context.setLineDash([3, 2.5]);
    context.beginPath();
    for (let end = setting.interval ?? Infinity; end <= moment.exact; end += setting.interval) {
      context.moveTo(columns.at(end) - 0.5, 0);
      context.lineTo(columns.at(end) - 0.5, height);
    }
    context.stroke();
    context.setLineDash([]);
  }

  function drawCurrent(context, columns, moment, y) {
    if (moment.step === 0) return;
    const x = columns.at(moment.step - 0.5);
    context.fillStyle = colour("ink");
    context.beginPath();
    context.moveTo(x, y);
    context.lineTo(x - 4, y + 6);
    context.lineTo(x + 4, y + 6);
    context.fill();
  }

  // The number of tokens at the front that are drawn as rectified. During the sweep of a rectification it is smaller.
  function drawnExact(setting, moment) {
    return moment.rectified ? moment.exact - Math.ceil(setting.interval * (1 - state.wiped)) : moment.exact;
  }

  function drawDrift(setting, moment) {
    const bars = isNarrow() ? 64 : 84, row = isNarrow() ? 5 : 7, gap = 11;
    const bottom = bars + gap + row * data.layers;
    const { context, left, width } = surface("drift", bottom + 22);
    const columns = tokenColumns(left, width);
    const exact = drawnExact(setting, moment);
    drawGrid(context, left, width, [0, 0.5, 1], (value) => bars - 1 - (value / driftTop) * (bars - 8));
    const styles = { drift: colour("drift"), ghost: colour("ghost"), unread: colour("unread") };
    for (let token = 0; token < moment.step; token++) {
      const x = columns.at(token), height = (setting.ofToken[token] / driftTop) * (bars - 8);
      if (token < exact) fill(context, styles.ghost, [x, bars - 1 - height, columns.thick, 1.5]);
      else fill(context, styles.drift, [x, bars - 1 - height, columns.thick, height]);
      fill(context, styles.unread, [x, bars + gap, columns.thick, row * data.layers - 1]);
      if (token < exact) continue;
      for (let layer = 0; layer < data.layers; layer++) {
        context.globalAlpha = shade(setting.drift[token][layer]);
        fill(context, styles.drift, [x, bars + gap + layer * row, columns.thick, row - 1]);
      }
      context.globalAlpha = 1;
    }
    for (const layer of [0, data.layers - 1]) label(context, String(layer), left - 6, bars + gap + (layer + 0.5) * row, "right");
    drawMarks(context, setting, moment, columns, bottom);
    drawCurrent(context, columns, moment, bottom + 1);
    drawTokenAxis(context, columns, bottom + 15);
    element("drift").setAttribute("aria-label", `Drift of ${plural(moment.step, "generated token")}, by layer. In the cache now: `
      + `${plural(moment.window, "token")} drifted, ${moment.exact} rectified. The largest drift is ${driftText(moment.drift)}.`);
  }

  // The square root shows the small drift of the first layers beside the large one of the last.
  const shade = (drift) => Math.sqrt(Math.min(drift / driftTop, 1));

  function drawGrid(context, left, width, values, y) {
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    for (const value of values) {
      context.beginPath();
      context.moveTo(left, Math.round(y(value)) + 0.5);
      context.lineTo(left + width, Math.round(y(value)) + 0.5);
      context.stroke();
      label(context, String(value), left - 6, y(value), "right");
    }
  }

  function drawDivergence(setting, moment) {
    const height = isNarrow() ? 58 : 66;
    const { context, left, width } = surface("divergence", height + 22);
    const columns = tokenColumns(left, width);
    const [low, high] = [-3, 1]; // powers of ten
    const y = (value) => height - 3 - ((Math.log10(Math.max(value, 10 ** low)) - low) / (high - low)) * (height - 10);
    drawGrid(context, left, width, [0.01, 0.1, 1, 10], y);
    const radius = isNarrow() ? 1.5 : 2.2;
    for (let token = 0; token < moment.step; token++) {
      const isExact = token % (setting.interval ?? steps) === 0; // the first of a window
      context.beginPath();
      context.arc(columns.at(token + 0.5), y(setting.divergence[token] * data.divergence_unit), isExact ? radius + 1 : radius, 0, 2 * Math.PI);
      context.lineWidth = 1.75;
      context.strokeStyle = colour("rectified");
      context.fillStyle = colour("drift");
      if (isExact) context.stroke();
      else context.fill();
    }
    drawMarks(context, setting, moment, columns, height);
    drawCurrent(context, columns, moment, height + 1);
    drawTokenAxis(context, columns, height + 15);
    const last = moment.step === 0 ? "none yet" : (setting.divergence[moment.step - 1] * data.divergence_unit).toFixed(3);
    element("divergence").setAttribute("aria-label", `Divergence of every step’s prediction from the dense one. This step: ${last} nats.`);
  }

  // ---- Showing and moving -------------------------------------------------------------------------------------------

  function drawPictures() {
    const setting = currentSetting();
    const moment = momentOf(setting, state.frame);
    drawBlocks(setting, moment);
    drawDrift(setting, moment);
    drawDivergence(setting, moment);
  }

  function show() {
    const setting = currentSetting();
    const moment = momentOf(setting, state.frame);
    if (state.lookedAt !== null) state.lookedAt = Math.min(state.lookedAt, moment.blocks - 1);
    document.body.toggleAttribute("data-rectified", moment.rectified);
    showControls(setting, moment);
    showState(setting, moment);
    showNumbers(setting, moment);
    showText(setting, moment);
    showParting(setting, moment);
    showInspected(setting, moment);
    drawPictures();
    return moment;
  }

  function showControls(setting, moment) {
    const last = setting.frames.length - 1;
    const scrub = element("scrub");
    scrub.max = last;
    scrub.value = state.frame;
    scrub.setAttribute("aria-valuetext", moment.rectified ? `rectification after step ${moment.step}` : `step ${moment.step} of ${steps}`);
    element("back").disabled = state.frame === 0;
    element("forward").disabled = state.frame === last;
    const play = element("play");
    play.toggleAttribute("data-playing", state.playing);
    play.setAttribute("aria-label", state.playing ? "Pause" : "Play");
    // A screen reader announces single steps, and not the hundreds that play by.
    element("state").setAttribute("aria-live", state.playing ? "off" : "polite");
    showSetting("interval", intervals.map((value) => value ?? "never"), intervalText(setting.interval));
    showSetting("ratio", ratios, String(setting.ratio));
  }

  function showSetting(id, stops, text) {
    element(id).max = stops.length - 1;
    element(id).value = state[id];
    element(id).setAttribute("aria-valuetext", text);
    element(`${id}-value`).textContent = text;
  }

  function goTo(frame) {
    const last = currentSetting().frames.length - 1;
    const isNext = frame === state.frame + 1;
    state.frame = Math.max(0, Math.min(frame, last));
    const moment = show();
    followText(moment);
    if (moment.rectified && isNext && !wantsStillness.matches) sweep(state.frame);
  }

  // The dense pass goes over the window from left to right: less than half a second.
  function sweep(frame, start = performance.now()) {
    requestAnimationFrame((now) => {
      state.wiped = state.frame === frame ? Math.min(Math.max(now - start, 0) / 450, 1) : 1;
      drawPictures();
      if (state.wiped < 1) sweep(frame, start);
    });
  }

  let timer = null;

  function setPlaying(playing) {
    clearTimeout(timer);
    const isAtEnd = state.frame === currentSetting().frames.length - 1;
    state.playing = playing;
    if (playing) goTo(isAtEnd ? 0 : state.frame + 1);
    else show();
    if (playing) timer = setTimeout(advance, delay());
  }

  function advance() {
    if (state.frame === currentSetting().frames.length - 1) return setPlaying(false);
    goTo(state.frame + 1);
    timer = setTimeout(advance, delay());
  }

  // A rectification stays long enough to be seen, at any speed.
  function delay() {
    const pause = 1000 / Number(element("speed").value);
    return currentSetting().frames[state.frame].rectified ? Math.max(pause, 700) : pause;
  }

  function stepBy(count) {
    setPlaying(false);
    goTo(state.frame + count);
  }

  // Keep the step under another setting. If that setting rectifies there, keep the rectification too.
  function choose(change) {
    const { step, rectified } = currentSetting().frames[state.frame];
    Object.assign(state, change);
    buildText(currentSetting());
    goTo(frameAt(step, rectified));
  }

  function frameAt(step, rectified) {
    const { frames } = currentSetting();
    const found = frames.findIndex((frame) => frame.step === step && frame.rectified === rectified);
    return found < 0 ? frames.findIndex((frame) => frame.step === step) : found;
  }

  // ---- Hands on -----------------------------------------------------------------------------------------------------

  function lookAt(block) {
    const { blocks } = momentOf(currentSetting(), state.frame);
    state.lookedAt = block === null ? null : Math.max(0, Math.min(block, blocks - 1));
    show();
  }

  function blockUnder(event) {
    const left = gutter();
    const block = Math.floor((event.offsetX - left) / ((element("blocks").clientWidth - left - 1) / allBlocks));
    return block < 0 || block >= momentOf(currentSetting(), state.frame).blocks ? null : block;
  }

  function onBlocksKey(event) {
    const { blocks } = momentOf(currentSetting(), state.frame);
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
    const last = currentSetting().frames.length - 1;
    const actions = { ArrowLeft: () => stepBy(-1), ArrowRight: () => stepBy(1), Home: () => stepBy(-last), End: () => stepBy(last) };
    if (event.key === " " && !focused("button, select, a")) {
      event.preventDefault();
      if (!event.repeat) setPlaying(!state.playing);
    } else if (event.key in actions && !focused("input, select, #blocks")) {
      event.preventDefault();
      actions[event.key]();
    }
  }

  function listen() {
    element("play").addEventListener("click", () => setPlaying(!state.playing));
    element("back").addEventListener("click", () => stepBy(-1));
    element("forward").addEventListener("click", () => stepBy(1));
    element("scrub").addEventListener("input", (event) => stepBy(event.target.valueAsNumber - state.frame));
    for (const id of ["interval", "ratio"]) {
      element(id).addEventListener("input", (event) => choose({ [id]: event.target.valueAsNumber }));
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
      const span = document.createElement("span");
      span.textContent = text;
      span.style.left = `${(index / (texts.length - 1)) * 100}%`;
      return span;
    }));
  }

  function buildLegend() {
    const stops = [0, 0.1, 0.25, 0.5, 0.75, 1].map((part) => {
      return `color-mix(in srgb, var(--drift) ${Math.sqrt(part) * 100}%, var(--unread)) ${part * 100}%`;
    });
    document.querySelector(".gradient").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    element("scale-top").textContent = driftTop.toFixed(1);
    write(element("source"), `Every number was recorded by `, { code: data.command }, `. The shipped model (checkpoint `,
      { code: data.checkpoint_sha256.slice(0, 12) }, `) continues the standard library’s ${data.module}.py, which was held out of its training. Decoding is `
      + `greedy, schedule “${data.config.schedule}”, block size ${b}, at least ${data.config.min_blocks} blocks. Bytes read follow from the cost model.`);
  }

  // Links to a place: index.html#interval=never&ratio=0.05&step=40, and &rectified for the rectification after that step.
  function readAddress() {
    const asked = new URLSearchParams(location.hash.slice(1));
    const interval = intervals.findIndex((value) => String(value ?? "never") === asked.get("interval"));
    const ratio = ratios.findIndex((value) => String(value) === asked.get("ratio"));
    setPlaying(false);
    choose({ interval: interval < 0 ? state.interval : interval, ratio: ratio < 0 ? state.ratio : ratio });
    const step = Math.min(Math.max(parseInt(asked.get("step") ?? "0", 10) || 0, 0), steps);
    goTo(frameAt(step, asked.has("rectified")));
  }

  buildStops("interval-stops", intervals.map((value) => value ?? "never"));
  buildStops("ratio-stops", ratios);
  buildLegend();
  readAddress();
  listen();
})();
