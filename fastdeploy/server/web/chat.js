// The conversation: what is kept, what is shown, what is sent.

import { ApiError, chat, models } from "./api.js";
import { Markdown, element } from "./markdown.js";
import { Tray, contentOf, dataUrl, thumbnail } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const SETTINGS = "fastdeploy.settings"; // of this browser
const THEME = "fastdeploy.theme";
const TALK = "fastdeploy.talk"; // of this tab
const KEY = "fastdeploy.key";

const turns = read(sessionStorage, TALK) ?? []; // {role, content, pictures?, lost?, thought?, thought_s?, calls?, figures?, note?}
let settings = read(localStorage, SETTINGS) ?? {};
let running = null; // {controller, view} while an answer comes in
let reads = null; // what the model takes, once that is known
const tray = new Tray($("tray"), () => showState());

function read(storage, name) {
  try {
    return JSON.parse(storage.getItem(name));
  } catch {
    return null; // somebody else's value under our name
  }
}

// Browsers keep a few MiB for a page: pictures that do not fit are not there after a reload.
function keep() {
  try {
    sessionStorage.setItem(TALK, JSON.stringify(turns));
  } catch {
    const without = turns.map(({ pictures, ...turn }) => (pictures ? { ...turn, lost: pictures.length } : turn));
    sessionStorage.setItem(TALK, JSON.stringify(without));
  }
}

// --- one answer on the screen ---

class AnswerView {
  constructor(turn) {
    this.turn = turn;
    this.started = performance.now();
    this.first = null; // when the first token came
    this.waiting = { thought: "", content: "" }; // text that is not drawn yet
    this.body = element("div", { class: "markdown", dir: "auto" });
    this.meta = element("div", { class: "meta" });
    this.node = element("article", { class: "turn assistant", "aria-label": "Answer" }, this.body, this.meta);
    this.markdown = new Markdown(this.body);
    this.calls = [];
    for (const field of ["thought", "content"]) if (turn[field]) this.draw(field, turn[field]);
    for (const [i, call] of (turn.calls ?? []).entries()) this.drawCall(i, call);
  }

  take(event) {
    const delta = event.choices?.[0]?.delta ?? {};
    const thought = delta.reasoning_content ?? delta.reasoning;
    const { turn } = this;
    if (thought) this.push("thought", thought);
    if (delta.content) this.push("content", delta.content);
    for (const part of delta.tool_calls ?? []) this.takeCall(part);
    if (thought || delta.content || delta.tool_calls) {
      this.first ??= performance.now();
      this.pieces = (this.pieces ?? 0) + 1;
    }
    this.tokens = event.usage?.completion_tokens ?? this.tokens;
    const reason = event.choices?.[0]?.finish_reason;
    if (reason === "length") turn.note = "Cut off: the most tokens allowed were reached.";
    this.figures();
    this.schedule();
  }

  push(field, text) {
    if (field === "content" && this.turn.thought && !this.turn.content) this.endThought();
    this.turn[field] = (this.turn[field] ?? "") + text;
    this.waiting[field] += text;
  }

  takeCall({ index = 0, function: part = {} }) {
    this.turn.calls ??= [];
    const call = (this.turn.calls[index] ??= { name: "", arguments: "" });
    call.name += part.name ?? "";
    call.arguments += part.arguments ?? "";
    this.drawCall(index, call);
  }

  figures() {
    const now = performance.now();
    const tokens = this.tokens ?? this.pieces ?? 0;
    const writing_s = (now - this.first) / 1000;
    this.turn.figures = {
      tokens,
      per_s: this.first && tokens > 1 && writing_s > 0.05 ? (tokens - 1) / writing_s : null,
      first_s: this.first && (this.first - this.started) / 1000,
    };
  }

  // Drawing waits for the next frame; many pieces may come before it.
  schedule() {
    this.frame ??= requestAnimationFrame(() => this.flush());
  }

  flush() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    follow(() => {
      for (const field of ["thought", "content"]) {
        if (this.waiting[field]) this.draw(field, this.waiting[field]);
        this.waiting[field] = "";
      }
      this.meta.replaceChildren(figuresText(this.turn.figures));
    });
  }

  draw(field, text) {
    if (field === "content") return this.markdown.append(text);
    if (!this.thought) {
      this.thoughtTitle = element("summary", {}, "Thinking\u2026");
      const inner = element("div", { class: "markdown", dir: "auto" });
      this.thought = element("details", { class: "thought" }, this.thoughtTitle, inner);
      this.thought.open = !("thought_s" in this.turn);
      this.thoughtMarkdown = new Markdown(inner);
      this.node.prepend(this.thought);
      if (!this.thought.open) this.endThought();
    }
    return this.thoughtMarkdown.append(text);
  }

  endThought() {
    if (this.first) this.turn.thought_s ??= (performance.now() - this.first) / 1000;
    if (!this.thought) return;
    const seconds = this.turn.thought_s;
    this.thoughtTitle.textContent = seconds === undefined ? "Thoughts" : `Thought for ${seconds.toFixed(1)} s`;
    this.thought.open = false;
  }

  drawCall(index, call) {
    let shown = this.calls[index];
    if (!shown) {
      shown = { name: element("code"), text: element("pre", { tabindex: "0" }) };
      this.calls[index] = shown;
      const head = element("figcaption", {}, "Tool call ", shown.name);
      this.body.after(element("figure", { class: "code call" }, head, shown.text));
    }
    shown.name.textContent = call.name;
    shown.text.textContent = indented(call.arguments);
  }

  // The last state: buttons, figures and why it ended.
  finish(note) {
    if (note) this.turn.note = note;
    if (this.turn.thought && !("thought_s" in this.turn)) {
      this.turn.thought_s = ((performance.now() - this.first) || 0) / 1000;
    }
    this.flush();
    if (this.thought && !this.turn.content) this.endThought();
    const { turn, meta } = this;
    if (turn.note) meta.before(element("p", { class: "note" }, turn.note));
    meta.replaceChildren(button("Copy", "answer"), button("Regenerate", "again"), figuresText(turn.figures));
  }
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not whole yet, or not JSON: shown as it is
  }
}

const button = (label, act) => element("button", { type: "button", "data-act": act }, label);

function figuresText(figures) {
  const node = element("span", { class: "figures" });
  if (!figures?.tokens) return node;
  const { tokens, per_s, first_s } = figures;
  const words = [`${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`];
  if (per_s) words.push(`${per_s.toFixed(per_s < 100 ? 1 : 0)} tok/s`);
  if (first_s) words.push(`first after ${first_s.toFixed(2)} s`);
  node.textContent = words.join(" \u00b7 ");
  return node;
}

function userNode(turn) {
  const text = element("div", { class: "bubble", dir: "auto" }, turn.content);
  const above = [];
  if (turn.pictures?.length) above.push(element("div", { class: "pictures" }, ...turn.pictures.map(thumbnail)));
  if (turn.lost) above.push(element("p", { class: "note" }, "The pictures of this message are gone: the browser keeps only a few MiB."));
  text.hidden = !turn.content;
  const meta = element("div", { class: "meta" }, button("Edit", "edit"), button("Copy", "question"));
  return element("article", { class: "turn user", "aria-label": "You" }, ...above, text, meta);
}

function redraw() {
  const nodes = turns.map((turn) => {
    if (turn.role === "user") return userNode(turn);
    const view = new AnswerView(turn);
    view.finish();
    return view.node;
  });
  $("talk").replaceChildren(...nodes);
  hideProblem();
  showState();
  toEnd();
}

// --- scrolling: the end is followed while the reader is there ---

function follow(change) {
  const box = $("scroller");
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  change();
  if (isAtEnd) toEnd();
}

function toEnd() {
  $("scroller").scrollTop = $("scroller").scrollHeight;
}

function showState() {
  const isEmpty = turns.length === 0;
  $("card").hidden = !isEmpty;
  $("clear").hidden = isEmpty;
  $("stop").hidden = !running;
  $("send").hidden = Boolean(running);
  $("send").disabled = !$("input").value.trim() && !tray.urls.length;
  $("talk").setAttribute("aria-busy", String(Boolean(running)));
  document.body.classList.toggle("running", Boolean(running));
}

// --- sending ---

function requestBody() {
  const history = turns.map((turn) => ({ role: turn.role, content: contentOf(turn) }));
  const system = settings.system?.trim() ? [{ role: "system", content: settings.system }] : [];
  const body = {
    model: $("model").value || undefined,
    messages: [...system, ...history],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  for (const name of NUMBERS) if (settings[name] !== undefined) body[name] = settings[name];
  return body;
}

async function answer() {
  hideProblem();
  const body = requestBody();
  const turn = { role: "assistant", content: "" };
  const view = new AnswerView(turn);
  running = { controller: new AbortController() };
  view.node.classList.add("live");
  $("talk").append(view.node);
  turns.push(turn);
  showState();
  toEnd();
  let failure = null;
  let note = null;
  try {
    for await (const event of chat(body, sessionStorage.getItem(KEY), running.controller.signal)) view.take(event);
  } catch (error) {
    if (error.name === "AbortError") note = "Stopped.";
    else if (error instanceof ApiError) failure = error;
    else throw error;
  } finally {
    running = null;
    view.node.classList.remove("live");
    const isEmpty = !turn.content && !turn.thought && !turn.calls;
    if (isEmpty && failure) {
      turns.pop();
      view.node.remove();
    } else {
      view.finish(failure ? "Broken off." : note);
    }
    keep();
    showState();
  }
  $("status").textContent = failure ? "" : note ?? "The answer is complete.";
  if (failure?.status === 401 && (await askKey(failure.message))) again();
  else if (failure) showProblem(failure);
}

function send(text, pictures = []) {
  const turn = { role: "user", content: text };
  if (pictures.length) turn.pictures = pictures;
  turns.push(turn);
  $("talk").append(userNode(turn));
  keep();
  return answer();
}

// Take back everything from turn `index` on.
function cut(index) {
  turns.length = index;
  keep();
  redraw();
}

const lastIndexOf = (role) => turns.findLastIndex((turn) => turn.role === role);

function again() {
  if (running) return;
  const last = lastIndexOf("user");
  if (last < 0) return;
  cut(last + 1);
  answer();
}

// --- errors and the key ---

function showProblem(error) {
  $("problem-text").textContent = problemText(error);
  $("retry").hidden = false;
  $("problem").hidden = false;
  toEnd();
}

function problemText({ status, message, retryAfter }) {
  const wait = retryAfter ? ` Try again in ${retryAfter} s.` : "";
  if (status === 0) return message;
  if (status === 429) return `The server is busy: ${message}.${wait}`;
  if (status === 503) return `The server is not ready: ${message}.${wait}`;
  if (status >= 500) return `The server has failed: ${message}.`;
  if (status === 401) return "The server wants a key before it answers.";
  return `The server refused this (${status}): ${message}`;
}

function hideProblem() {
  $("problem").hidden = true;
}

// True when a key was given.
function askKey(reason) {
  const had = sessionStorage.getItem(KEY);
  $("key-text").textContent = had ? `The last one was not accepted: ${reason}.` : "Whoever runs it has one for you.";
  $("key").value = "";
  $("key-dialog").returnValue = "";
  $("key-dialog").showModal();
  return new Promise((resolve) => {
    $("key-dialog").addEventListener("close", () => {
      const key = $("key").value.trim();
      const isGiven = $("key-dialog").returnValue === "given" && key !== "";
      if (isGiven) sessionStorage.setItem(KEY, key);
      resolve(isGiven);
    }, { once: true });
  });
}

// --- the model card ---

async function showModels() {
  let cards;
  try {
    cards = await models(sessionStorage.getItem(KEY));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401 && (await askKey(error.message))) return showModels();
    return showProblem(error);
  }
  const [card] = cards;
  const name = card.id;
  const context = card.max_model_len;
  $("title").textContent = $("card-name").textContent = document.title = name;
  $("context").textContent = context ? `${context.toLocaleString("en")} tokens` : "";
  const facts = [["Context", context && `${context.toLocaleString("en")} tokens`], ["Served by", card.owned_by],
    ["Since", card.created && new Date(card.created * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" })],
    ["Adapters", cards.length > 1 && String(cards.length - 1)]];
  const shown = facts.filter(([, value]) => value);
  $("facts").replaceChildren(...shown.map(([term, value]) =>
    element("div", {}, element("dt", {}, term), element("dd", {}, value))));
  $("model").replaceChildren(...cards.map(({ id }) => element("option", { value: id }, id)));
  reads = card.input_modalities ?? ["text"];
  $("attach").hidden = !reads.includes("image");
  $("model").hidden = cards.length < 2;
  $("title").hidden = cards.length > 1;
  return undefined;
}

// --- what the reader does ---

async function copy(text, node) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyByHand(text);
  node.textContent = "Copied";
  setTimeout(() => (node.textContent = "Copy"), 1500);
}

// Browsers give the clipboard to https and loopback only.
function copyByHand(text) {
  const box = element("textarea", { class: "hidden" });
  box.value = text;
  document.body.append(box);
  box.select();
  document.execCommand("copy");
  box.remove();
}

function edit(node, index) {
  const box = element("textarea", { "aria-label": "Edit your message", rows: "3" });
  box.value = turns[index].content;
  const save = element("button", { type: "button", class: "primary" }, "Send");
  const cancel = element("button", { type: "button" }, "Cancel");
  node.replaceChildren(element("div", { class: "editor" }, box, element("div", { class: "row" }, cancel, save)));
  const done = () => {
    const text = box.value.trim();
    const { pictures } = turns[index];
    if ((!text && !pictures) || running) return;
    cut(index);
    send(text, pictures);
  };
  save.onclick = done;
  cancel.onclick = redraw;
  box.onkeydown = (event) => {
    if (event.key === "Escape") redraw();
    else if (isSending(event)) done();
    else return;
    event.preventDefault();
  };
  grow(box);
  box.oninput = () => grow(box);
  box.focus();
}

// Enter, unless an input method is still composing with it.
const isSending = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function grow(box) {
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

$("talk").addEventListener("click", ({ target }) => {
  const turn = target.closest(".turn");
  const index = [...$("talk").children].indexOf(turn);
  const act = target.dataset.act;
  if (target.dataset.copy) copy(target.closest("figure").code.data, target);
  else if (act === "answer" || act === "question") copy(turns[index].content, target);
  else if (act === "again") again();
  else if (act === "edit" && !running) edit(turn, index);
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("input").value.trim();
  if ((!text && !tray.urls.length) || running) return;
  $("input").value = "";
  grow($("input"));
  send(text, tray.take());
});
$("input").addEventListener("keydown", (event) => {
  if (!isSending(event)) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("input").addEventListener("input", () => {
  grow($("input"));
  showState();
});
$("stop").onclick = () => running?.controller.abort();
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.controller.abort();
});
$("retry").onclick = () => (lastIndexOf("user") < 0 ? location.reload() : again());
$("clear").onclick = () => {
  running?.controller.abort();
  turns.length = 0;
  keep();
  redraw();
  $("input").focus();
};

// --- pictures: by button, drop and paste ---

async function addPictures(files) {
  if (!files.length) return;
  hideProblem();
  if (reads && !reads.includes("image")) return showNote("This model reads text only.");
  for (const file of files) {
    try {
      tray.add(await dataUrl(file));
    } catch (error) {
      showNote(error.message);
    }
  }
  $("input").focus();
}

// Of what the reader did; there is nothing to try again.
function showNote(message) {
  showProblem({ status: 0, message });
  $("retry").hidden = true;
}

const hasFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");

$("attach").onclick = () => $("files").click();
$("files").onchange = async () => {
  await addPictures([...$("files").files]);
  $("files").value = "";
};
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  addPictures(files);
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (!hasFiles(event)) return;
  event.preventDefault();
  addPictures([...event.dataTransfer.files]);
});

// --- settings and theme ---

function fillSettings() {
  for (const field of $("settings").querySelectorAll("[name]")) field.value = settings[field.name] ?? "";
}

$("open-settings").onclick = () => {
  fillSettings();
  $("settings").showModal();
};
$("settings").addEventListener("input", () => {
  const fields = [...$("settings").querySelectorAll("[name]")].filter(({ value }) => value !== "");
  settings = Object.fromEntries(fields
    .filter((field) => field.checkValidity())
    .map(({ name, value }) => [name, NUMBERS.includes(name) ? Number(value) : value]));
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
});
$("settings").addEventListener("click", ({ target }) => {
  if (target === $("settings")) $("settings").close(); // the backdrop
});
$("reset").onclick = () => {
  settings = {};
  localStorage.removeItem(SETTINGS);
  fillSettings();
};
$("key-form").onsubmit = () => ($("key-dialog").returnValue = "given");
$("no-key").onclick = () => $("key-dialog").close("");

function showTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
}

$("theme").onclick = () => {
  const { theme: chosen = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light" } = document.documentElement.dataset;
  const theme = chosen === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, theme);
  showTheme(theme);
};

showTheme(localStorage.getItem(THEME));
addEventListener("pagehide", keep);
redraw();
showModels();
