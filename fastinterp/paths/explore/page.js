// The page: sliders, a prompt, the text that the model generates at the point and at the ends, and ways to keep a point.
// Its state is in the address, so that a reload keeps it. Numbers and text come from the program on this machine alone.

import {drawChange, drawMetrics, drawPlane, short, snapped} from "./figures.js";

const $ = id => document.getElementById(id);
const WAIT = 200; // ms without input before a new text is requested
const TOKEN = new URLSearchParams(location.search).get("token") || "";
const PAGE = Array.from(crypto.getRandomValues(new Uint32Array(3)), v => v.toString(36)).join("-");
const ENDED = "The program does not answer: it was ended, or it failed. Its terminal says more.";
const SETTINGS = ["prompt", "length", "seed", "temperature"];
const KINDS = [["greedy", false], ["sampled", true]];
let facts, alphas = {}, sliders = {}, history = [], columns = [], timer, pending, turn = 0;
let ends = ""; // the settings that the texts at the ends were made with

// An answer of the program, or {error}.
async function ask(path, document, signal) {
  const headers = {"x-token": TOKEN};
  if (document) headers["content-type"] = "application/json";
  try {
    const response = await fetch(path, {method: document ? "POST" : "GET", signal, headers, body: document && JSON.stringify(document)});
    return {status: response.status, ...await response.json()};
  } catch (error) {
    return {error: signal && signal.aborted ? "" : ENDED};
  }
}
function element(name, parent, properties, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  if (parent) parent.append(made);
  return made;
}

// ---- the state in the address: alpha.NAME for each slider, the settings, the messages of a conversation

function keep() {
  const state = new URLSearchParams();
  for (const s of facts.sliders) state.set(`alpha.${s.name}`, alphas[s.name]);
  for (const id of SETTINGS) state.set(id, $(id).value);
  if (history.length) state.set("history", JSON.stringify(history));
  window.history.replaceState(null, "", `${location.search}#${state}`);
}
function recall() {
  const state = new URLSearchParams(location.hash.slice(1));
  for (const s of facts.sliders) {
    const value = state.get(`alpha.${s.name}`);
    alphas[s.name] = value === null || value === "" || !Number.isFinite(+value) ? s.start : +value;
  }
  for (const id of SETTINGS) if (state.has(id)) $(id).value = state.get(id);
  try {
    history = facts.chat ? JSON.parse(state.get("history")) || [] : [];
  } catch (error) {
    history = [];
  }
}

// ---- sliders

const line = () => facts.sliders.length === 1;
const baseName = path => path.replace(/\/+$/, "").split("/").pop();

function addSlider(s) {
  const range = element("input", null, {type: "range", id: `slider-${s.name}`, min: s.low, max: s.high, step: 0.01});
  const number = element("input", null, {type: "number", step: 0.05});
  number.setAttribute("aria-label", `${s.name}, as a number`);
  const label = element("label", null, {htmlFor: range.id}, s.name, element("small", null, {textContent: line() ? "" : ` ${s.model}`}));
  const marks = element("div", null, {className: "marks"});
  const names = line() ? ["A", "", "B"] : ["base", "", s.name];
  [0, 0.5, 1].forEach((v, i) => {
    if (v < s.low || v > s.high) return;
    const title = [facts.base, "", s.model][i];
    const mark = element("span", marks, {title}, String(v), element("b", null, {textContent: names[i]}));
    mark.style.left = `${(v - s.low) / (s.high - s.low) * 100}%`;
  });
  let dragged = false;
  range.addEventListener("pointerdown", () => { dragged = true; });
  window.addEventListener("pointerup", () => { dragged = false; });
  range.addEventListener("input", () => {
    if (dragged) range.value = snapped(+range.value, s);
    move({[s.name]: +range.value});
  });
  number.addEventListener("input", () => {
    if (number.value !== "" && Number.isFinite(+number.value)) move({[s.name]: +number.value}, number);
  });
  element("div", $("sliders"), {className: "slider"}, label, range, number, marks);
  sliders[s.name] = {range, number};
}
// Sets sliders. typing: the box that is being typed into, which is left alone.
function move(values, typing) {
  Object.assign(alphas, values);
  for (const name in values) {
    sliders[name].range.value = values[name];
    if (sliders[name].number !== typing) sliders[name].number.value = short(values[name]);
  }
  draw();
  later();
}

// ---- text: a column for the point, and one for each end

function addColumns() {
  const zeros = Object.fromEntries(facts.sliders.map(s => [s.name, 0]));
  const first = {name: line() ? "A" : "base", model: facts.base, alphas: zeros};
  const here = {name: "here", model: "", alphas: null};
  columns = line() ? [first, here, {name: "B", model: facts.sliders[0].model, alphas: {[facts.sliders[0].name]: 1}}] : [first, here];
  for (const column of columns) {
    const title = element("h2", null, {title: column.model}, line() && column.model ? `${column.name}: ${baseName(column.model)}` : column.name, " ");
    column.at = element("small", title, {});
    column.box = element("section", $("texts"), {className: column.alphas ? "column" : "column here"}, title);
    for (const [kind] of KINDS) {
      const id = column.alphas ? `${kind}-${column.name}` : kind;
      const note = element("small", null, {id: `${id}-note`});
      element("h3", column.box, {}, kind, " ", note);
      const box = element("div", column.box, {id, className: "text"});
      box.setAttribute("aria-live", "polite");
      column[kind] = {box, note, text: ""};
    }
    if (facts.chat && !column.alphas) element("button", column.box, {type: "button", id: "reply", textContent: "Continue with the greedy answer", disabled: true, onclick: reply});
  }
}
const settings = () => ({prompt: $("prompt").value, seed: +$("seed").value, length: +$("length").value, temperature: +$("temperature").value, history});

function later() {
  clearTimeout(timer);
  keep();
  limit();
  if (pending) pending.abort();
  if (JSON.stringify(settings()) !== ends) ends = "";
  for (const column of columns) if (!column.alphas || !ends) for (const [kind] of KINDS) column[kind].box.classList.add("old");
  if ($("reply")) $("reply").disabled = true;
  timer = setTimeout(generate, WAIT);
}
// The one limit of tokens is the program's.
function limit() {
  const over = +$("length").value > facts.most_tokens;
  $("limit").textContent = over ? `at most ${facts.most_tokens} tokens` : "";
}
async function generate() {
  pending = new AbortController();
  const signal = pending.signal, wanted = settings(), key = JSON.stringify(wanted);
  turn += 1;
  const asked = columns.filter(c => !c.alphas || key !== ends).sort((a, b) => (a.alphas ? 1 : 0) - (b.alphas ? 1 : 0)); // the point first
  for (const column of asked) {
    for (const [kind, sampled] of KINDS) {
      const start = performance.now(), shown = column[kind];
      shown.note.textContent = "writing ...";
      const result = await ask("/text", {...wanted, page: PAGE, turn, alphas: column.alphas || {...alphas}, sampled}, signal);
      if (signal.aborted) return;
      const bad = result.status === 409 ? "Another page uses the model now. Move a slider to use it here again." : result.error || "";
      show(shown, wanted.prompt, result.text || "", bad);
      shown.note.textContent = bad ? "" : `${((performance.now() - start) / 1000).toFixed(1)} s`;
      if (bad && column.alphas === null) {
        for (const other of columns) for (const [k] of KINDS) if (other[k] !== shown) other[k].note.textContent = "";
        if (result.status === 409 || result.status === undefined) return;
      } else if (kind === "greedy" && !column.alphas && $("reply")) $("reply").disabled = !result.text;
      if (bad && column.alphas) return;
    }
  }
  ends = key;
}
function show(shown, prompt, text, bad) {
  shown.text = text;
  shown.box.className = bad ? "text bad" : "text";
  const start = element("b", null, {textContent: facts.chat ? "" : prompt});
  shown.box.replaceChildren(...(bad ? [bad] : [start, text]));
}

// ---- a conversation: messages of the user and of the model are kept apart

function reply() {
  const here = columns.find(c => !c.alphas);
  history.push({role: "user", content: $("prompt").value}, {role: "assistant", content: here.greedy.text});
  $("prompt").value = "";
  drawHistory();
  $("prompt").focus();
  later();
}
function drawHistory() {
  $("history").hidden = !history.length;
  $("history").replaceChildren(...history.map(m => element("p", null, {className: m.role, textContent: m.content})));
  if (history.length) element("button", $("history"), {type: "button", id: "forget", textContent: "New conversation", onclick: () => {
    history = [];
    drawHistory();
    later();
  }});
  $("history").scrollTop = $("history").scrollHeight;
}

// ---- keeping a point: its command, its recipe, its checkpoint

function say(text, bad) {
  $("said").textContent = text;
  $("said").className = bad ? "bad" : "";
}
async function copy(what) {
  const result = await ask("/recipe", {alphas});
  if (result.error) return say(result.error, true);
  const text = result[what];
  try {
    await navigator.clipboard.writeText(text);
    say(`copied: ${text}`);
  } catch (error) {
    say(text); // no access to the clipboard: it is there to be selected
  }
}
async function save(event) {
  event.preventDefault();
  const button = $("save-form").querySelector("[type=submit]"), folder = $("folder").value;
  button.disabled = true;
  say("writing ...");
  const watch = setInterval(async () => {
    const {fraction} = await ask("/progress");
    if (fraction) say(`writing ... ${Math.floor(fraction * 100)} %`);
  }, 500);
  const result = await ask("/save", {alphas: {...alphas}, folder});
  clearInterval(watch);
  button.disabled = false;
  if (result.error) return say(result.error, true);
  $("save-form").hidden = true;
  say(`saved in ${result.folder}\n${result.report}`);
}

// ---- all of it

const READ = $("readout").textContent;
function draw() {
  $("readout").textContent = READ; // the number of a cell is that of the point before
  const total = drawChange($("change"), facts, alphas, text => { $("readout").textContent = text; });
  $("total").textContent = `|change| / |base| of all: ${short(total)}`;
  if (facts.sliders.length === 2) drawPlane($("plane"), facts, alphas, move);
  for (const column of columns) {
    const values = column.alphas || alphas;
    column.at.textContent = column.alphas && !line() ? "" : facts.sliders.map(s => `${s.name} = ${short(values[s.name])}`).join(", ");
  }
  const kind = facts.report ? facts.report.varied.length : 0;
  $("metrics").hidden = kind < 1 || kind > 2;
  if (!$("metrics").hidden) drawMetrics($("curves"), facts, alphas);
}
async function begin() {
  facts = await ask("/facts");
  if (facts.error) return say(facts.error, true);
  $("base").textContent = line() ? `A ${facts.base}, B ${facts.sliders[0].model}` : `base ${facts.base}`;
  $("prompt-label").textContent = facts.chat ? "Message" : "Prompt";
  $("plane").hidden = facts.sliders.length !== 2;
  $("length").max = facts.most_tokens;
  $("length").value = Math.min(40, facts.most_tokens);
  $("prompt").value = facts.prompt;
  $("folder").value = "merged";
  recall();
  facts.sliders.forEach(addSlider);
  addColumns();
  drawHistory();
  for (const id of SETTINGS) $(id).addEventListener("input", later);
  $("copy-command").addEventListener("click", () => copy("command"));
  $("copy-recipe").addEventListener("click", () => copy("recipe"));
  $("save").addEventListener("click", () => { $("save-form").hidden = false; $("folder").select(); });
  $("save-cancel").addEventListener("click", () => { $("save-form").hidden = true; say(""); });
  $("save-form").addEventListener("submit", save);
  window.addEventListener("resize", draw);
  move(alphas);
}
begin();
