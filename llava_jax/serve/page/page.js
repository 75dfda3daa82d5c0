// The chat page. It talks to POST v1/chat/completions and GET v1/models. Texts of users and models become text nodes
// only. The chat is kept in sessionStorage, so it survives a reload and ends with the tab.
import {ask, get, url} from "./api.js";
import {icon} from "./icons.js";
import {program} from "./program.js";
import {STRINGS} from "./strings.js";

const LIMITS = {body_bytes: 32 * 2 ** 20, image_bytes: 20 * 2 ** 20, image_pixels: 50_000_000}; // the server's defaults
const TYPES = ["image/jpeg", "image/png", "image/webp", "image/gif"]; // pictures of other types become JPEG
const SHRUNK_SIDE = 2048; // longer side of a picture that is made smaller
const DEFAULTS = {system: "", temperature: 0.2, top_p: 0.7, max_tokens: 512};
const EXAMPLES = ["Where is the green triangle?", "How many yellow objects are there?",
  "What colour is the object at the right?", "What shape is the object at the top-left?"];
const $ = id => document.getElementById(id);
let chat = []; // {role: "user", text, images: [{url, name}]} and {role: "assistant", text, error, note, wait, stats}
let draft = []; // images of the next question; its text is in the text area
let editing = null; // {index, text, images}: the question that is edited, and what was in the composer before
let settings = {...DEFAULTS};
let models = [];
let running = null; // {message, controller, node} of the answer that is being written
let adding = Promise.resolve(); // done when all chosen pictures are in the draft
let atEnd = true; // whether the reader is at the end of the chat, which then stays in sight
let kind = "curl"; // of the program that is shown
let code = "";
let toldUnsaved = false;
let notice = []; // arguments of the last `notify`
let language = read("localStorage", "language") ?? (navigator.language.startsWith("ko") ? "ko" : "en");

function t(key, ...values) {
  const text = STRINGS[language][key];
  return typeof text === "function" ? text(...values) : text;
}

/** Reads from a storage of the browser, whose very name throws if the reader has forbidden it. */
function read(storage, key) {
  try { return JSON.parse(window[storage].getItem(key)); } catch { return null; }
}

/** Returns whether the storage has taken the value. */
function write(storage, key, value) {
  try {
    window[storage].removeItem(key); // an older value would be wrong
    window[storage].setItem(key, JSON.stringify(value));
    return true;
  } catch { return false; }
}

/** Makes an element. Strings among the children become text nodes. */
function make(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter(child => child));
  return element;
}

function iconButton(name, label, onclick) {
  return make("button", {type: "button", title: label, ariaLabel: label, onclick}, icon(name));
}

function announce(text) { $("announce").textContent = text; }

/** Shows a line above the composer, with a button if there is something to do. */
function notify(told, action, run) {
  notice = [told, action, run];
  const [span, button] = $("notice").children;
  span.textContent = t(...told);
  button.hidden = !action;
  button.textContent = action ? t(action) : "";
  button.onclick = () => { $("notice").hidden = true; run(); };
  $("notice").hidden = false;
}

async function copy(text, button) {
  try { await navigator.clipboard.writeText(text); } catch { // only pages of https or localhost have a clipboard
    const area = make("textarea", {value: text});
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  announce(t("copied"));
  button.firstChild.replaceWith(icon("check"));
  setTimeout(() => button.firstChild.replaceWith(icon("copy")), 1500);
}

// ---- Pictures

function readUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function shrink(bitmap) {
  const scale = Math.min(1, SHRUNK_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map(side => Math.max(1, Math.round(side * scale)));
  const canvas = make("canvas", {width, height});
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

async function addFile(file) {
  const name = file.name || "picture.png";
  try {
    const bitmap = await createImageBitmap(file);
    const others = [...chat.flatMap(message => message.images ?? []), ...draft];
    const used = others.reduce((sum, {url}) => sum + url.length, 0);
    const isLarge = file.size > LIMITS.image_bytes || bitmap.width * bitmap.height > LIMITS.image_pixels ||
      used + file.size * 4 / 3 > LIMITS.body_bytes - 2 ** 20;
    draft.push({name, url: isLarge || !TYPES.includes(file.type) ? shrink(bitmap) : await readUrl(file)});
    bitmap.close();
    if (isLarge) notify(["shrunk", name]);
  } catch { notify(["badImage", name]); }
  showDraft();
}

function addFiles(files) {
  for (const file of files) adding = adding.then(() => addFile(file));
  adding = adding.then(save);
  if (matchMedia("(pointer: fine)").matches) $("question").focus();
}

// ---- Showing

function showDraft() {
  $("pictures").hidden = !draft.length;
  $("pictures").replaceChildren(...draft.map((image, index) => make("li", {},
    make("img", {src: image.url, alt: image.name, title: image.name}),
    iconButton("close", t("remove", image.name), () => {
      draft.splice(index, 1);
      showDraft();
      $("question").focus();
    }))));
  $("question").style.height = "auto";
  $("question").style.height = `${$("question").scrollHeight}px`;
  $("send").classList.toggle("empty", !$("question").value.trim() && !draft.length);
}

function showChat() {
  $("welcome").hidden = chat.length > 0;
  $("messages").replaceChildren(...chat.map((message, index) => {
    const isLast = index === chat.length - 1;
    const item = message.role === "user" ? questionItem(message, index) : answerItem(message, isLast);
    item.classList.toggle("later", editing !== null && index >= editing.index);
    return item;
  }));
  const wasFocused = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  if (wasFocused) $(running ? "stop" : "send").focus();
  $("editing").hidden = !editing;
  scrollDown();
}

function questionItem(message, index) {
  return make("li", {className: "user"}, make("span", {className: "unseen"}, t("you")),
    message.images.length && make("div", {className: "images"},
      ...message.images.map(image => make("img", {src: image.url, alt: image.name}))),
    make("div", {className: "row"}, iconButton("edit", t("edit"), () => edit(index)),
      message.text && make("div", {className: "text"}, message.text)));
}

function answerItem(message, isLast) {
  const node = document.createTextNode(message.text);
  const isRunning = running?.message === message;
  if (isRunning) running.node = node;
  const again = () => { chat.pop(); answer(); };
  const isRefused = ["refused", "large"].includes(message.error?.[0]); // it would be again
  const note = message.wait ? t("busy", message.wait) : message.note && t(message.note);
  return make("li", {className: isRunning ? "answer waiting" : "answer", ariaBusy: String(isRunning)},
    make("span", {className: "unseen"}, t("it")),
    make("div", {className: "text"}, node),
    note && make("p", {className: "note"}, note),
    message.error && make("p", {className: "error"}, t(...message.error),
      isLast && make("button", {type: "button", onclick: isRefused ? () => edit(chat.length - 2) : again},
        t(isRefused ? "edit" : "retry"))),
    !isRunning && make("div", {className: "actions"},
      message.text && iconButton("copy", t("copy"), event => copy(message.text, event.currentTarget)),
      isLast && !message.error && iconButton("again", t("again"), again),
      message.stats && make("span", {className: "stats", title: t("rateHint")}, statsText(message.stats))));
}

function statsText({tokens, prompt, seconds, first}) {
  const number = (value, digits) => value.toLocaleString(language, {maximumFractionDigits: digits});
  const rate = tokens / seconds;
  const parts = [t("tokens", number(tokens, 0)), t("rate", number(rate, rate < 10 ? 1 : 0)),
    t("first", number(Math.max(first, 0.01), 2)), t("prompt", number(prompt, 0))];
  return parts.map(part => part.replaceAll(" ", "\u00a0")).join("\u00a0· ");
}

function scrollDown() {
  if (atEnd && chat.length) $("chat").scrollTop = $("chat").scrollHeight;
}

// ---- Asking

/** Returns the messages of a request. The server joins a question that has no answer with the next one. */
function messagesOf(turns, urlOf = image => image.url) {
  const messages = turns.filter(turn => turn.role === "user" || turn.text).map(({role, text, images = []}) => {
    if (!images.length) return {role, content: text};
    const parts = images.map(image => ({type: "image_url", image_url: {url: urlOf(image)}}));
    return {role, content: text ? [...parts, {type: "text", text}] : parts};
  });
  return settings.system.trim() ? [{role: "system", content: settings.system}, ...messages] : messages;
}

function optionsOf({model, temperature, top_p, max_tokens}) {
  return {model, temperature, top_p, max_tokens};
}

async function receive(message, signal) {
  const body = {...optionsOf(settings), messages: messagesOf(chat.slice(0, -1))};
  const wait = seconds => { message.wait = seconds; showChat(); };
  const start = performance.now();
  let first = null;
  for await (const event of ask(body, signal, wait)) {
    const choice = event.choices?.[0];
    const text = choice?.delta?.content ?? "";
    const piece = message.text ? text : text.trimStart();
    if (text) first ??= performance.now();
    message.text += piece;
    running.node.data += piece;
    if (choice?.finish_reason === "length") message.note = "length";
    if (event.usage) {
      const end = performance.now();
      message.stats = {tokens: event.usage.completion_tokens, prompt: event.usage.prompt_tokens,
        seconds: (end - start) / 1000, first: ((first ?? end) - start) / 1000};
    }
  }
}

/** Writes the answer of the chat's last question. */
async function answer() {
  const message = {role: "assistant", text: ""};
  const controller = new AbortController();
  chat.push(message);
  running = {message, controller};
  if (editing) restoreComposer();
  atEnd = true;
  $("notice").hidden = true;
  announce(t("writing"));
  showChat();
  save();
  try {
    await receive(message, controller.signal);
    if (!models.length) loadModels();
  } catch (error) {
    if (controller.signal.aborted) message.note = "stopped";
    else message.error = error.told ?? [message.text ? "lost" : "unreachable"];
  }
  message.wait = 0;
  if (!chat.includes(message)) return; // the chat was cleared
  running = null;
  showChat();
  announce(message.error ? `${message.text} ${t(...message.error)}` : message.text);
  save();
}

async function send() {
  await adding;
  const text = $("question").value.trim();
  if (running) return;
  if (!text && !draft.length) { $("question").focus(); return; }
  if (editing) chat.splice(editing.index);
  chat.push({role: "user", text, images: draft});
  restoreComposer();
  await answer();
}

function edit(index) {
  editing = {text: $("question").value, images: draft, ...editing, index};
  $("question").value = chat[index].text;
  draft = [...chat[index].images];
  showDraft();
  showChat();
  $("messages").children[index].scrollIntoView({block: "nearest"});
  $("question").focus();
}

/** Empties the composer, or puts back what was in it before the edit. */
function restoreComposer() {
  $("question").value = editing?.text ?? "";
  draft = editing?.images ?? [];
  editing = null;
  showDraft();
}

function cancelEdit() {
  restoreComposer();
  showChat();
  $("question").focus();
}

function clear() {
  if (editing) restoreComposer();
  const before = {chat, draft, text: $("question").value};
  if (!before.chat.length && !before.draft.length && !before.text) return;
  running?.controller.abort();
  running = null;
  chat = [];
  restoreComposer();
  show();
  $("chat").scrollTop = 0;
  $("question").focus();
  notify(["cleared"], "undo", () => {
    [chat, draft, $("question").value] = [before.chat, before.draft, before.text];
    show();
    $("question").focus();
  });
}

async function example(index) {
  try {
    const blob = await (await get(`examples/${index + 1}.jpg`)).blob();
    addFiles([new File([blob], `${index + 1}.jpg`, {type: "image/jpeg"})]);
    $("question").value = EXAMPLES[index];
    await send();
  } catch (error) { notify(error.told ?? ["unreachable"]); }
}

// ---- Models, settings, program, theme, language

async function loadModels() {
  try {
    models = (await (await get("v1/models")).json()).data.map(model => model.id);
  } catch (error) {
    notify(error.told ?? ["unreachable"], "retry", loadModels);
    return;
  }
  if (!models.includes(settings.model)) settings.model = models[0];
  $("model").hidden = models.length < 2;
  $("model").replaceChildren(...models.map(name => make("option", {value: name}, name)));
  $("model").value = settings.model;
  $("model-name").textContent = models.length === 1 ? models[0] : "";
}

function showSettings() {
  for (const key of Object.keys(DEFAULTS)) {
    $(key).value = settings[key];
    const output = document.querySelector(`output[for=${key}]`);
    if (output) output.textContent = Number(settings[key]).toLocaleString(language);
  }
}

/** Shows the request that Send would send, or the chat's last one. */
function showCode() {
  const text = $("question").value.trim();
  let turns = chat.slice(0, editing?.index);
  if (text || draft.length) turns.push({role: "user", text, images: draft});
  else if (!turns.length) turns.push({role: "user", text: EXAMPLES[0], images: []});
  else turns = turns.slice(0, turns.findLastIndex(turn => turn.role === "user") + 1);
  code = program(kind, messagesOf(turns, image => image), optionsOf(settings), url("v1"));
  $("program").textContent = code.replace(/(base64,.{12})[\w+/=]{24,}/g, "$1…");
  for (const name of ["curl", "python"]) $(`as-${name}`).ariaPressed = String(kind === name);
}

function systemTheme() { return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"; }

function showTheme() { document.documentElement.dataset.theme = read("localStorage", "theme") ?? ""; }

function toggleTheme() {
  const next = (document.documentElement.dataset.theme || systemTheme()) === "dark" ? "light" : "dark";
  write("localStorage", "theme", next === systemTheme() ? null : next);
  showTheme();
}

function showLanguage() {
  document.documentElement.lang = language;
  for (const element of document.querySelectorAll("[data-text], [data-placeholder], [data-label]")) {
    const {text, placeholder, label} = element.dataset;
    if (text) element.textContent = t(text);
    if (placeholder) element.placeholder = t(placeholder);
    if (label) element.ariaLabel = t(label);
    if (label && element.matches("button")) element.title = t(label);
  }
  $("language").textContent = t("other");
  $("language").lang = language === "en" ? "ko" : "en";
  show();
}

function show() {
  showDraft();
  showChat();
  showSettings();
  save();
}

// ---- Keeping

function save() {
  const question = editing ?? {text: $("question").value, images: draft};
  const isKept = write("sessionStorage", "chat", {chat, question, settings});
  if (!isKept && !toldUnsaved) notify(["unsaved"]);
  toldUnsaved = !isKept;
  return isKept;
}

function restore() {
  const kept = read("sessionStorage", "chat");
  if (!kept) return;
  chat = kept.chat;
  draft = kept.question.images;
  $("question").value = kept.question.text;
  Object.assign(settings, kept.settings);
}

addEventListener("beforeunload", event => { if (!save()) event.preventDefault(); }); // the browser asks the reader
addEventListener("pagehide", () => {
  if (running) running.message.note = "stopped";
  save();
});

// ---- Events

$("composer").onsubmit = event => { event.preventDefault(); send(); };
$("question").oninput = showDraft;
$("question").onkeydown = event => {
  const isComposing = event.isComposing || event.keyCode === 229; // Enter ends a syllable of an input method
  if (event.key !== "Enter" || event.shiftKey || isComposing || matchMedia("(pointer: coarse)").matches) return;
  event.preventDefault();
  send();
};
$("stop").onclick = () => running?.controller.abort();
$("cancel").onclick = cancelEdit;
$("new").onclick = clear;
$("theme").onclick = toggleTheme;
$("language").onclick = () => {
  language = language === "en" ? "ko" : "en";
  write("localStorage", "language", language);
  if (!$("notice").hidden) notify(...notice);
  showLanguage();
};
$("model").onchange = () => { settings.model = $("model").value; save(); };
$("open-settings").onclick = () => $("settings").showModal();
$("defaults").onclick = () => { Object.assign(settings, DEFAULTS); showSettings(); };
for (const key of Object.keys(DEFAULTS)) {
  $(key).oninput = () => { settings[key] = key === "system" ? $(key).value : Number($(key).value); showSettings(); };
}
$("open-code").onclick = () => { showCode(); $("code").showModal(); };
for (const name of ["curl", "python"]) $(`as-${name}`).onclick = () => { kind = name; showCode(); };
$("copy-code").onclick = event => copy(code, event.currentTarget);
for (const [button, input] of [["attach", "files"], ["camera", "photo"]]) {
  $(button).onclick = () => $(input).click();
  $(input).onchange = () => { addFiles([...$(input).files]); $(input).value = ""; };
}
addEventListener("keydown", event => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (running) running.controller.abort();
  else if (editing) cancelEdit();
});
addEventListener("paste", event => {
  const files = [...event.clipboardData.files];
  if (!files.length || event.clipboardData.types.includes("text/plain")) return; // cells of a sheet come as both
  event.preventDefault();
  addFiles(files);
});
for (const type of ["dragover", "dragleave", "drop"]) {
  addEventListener(type, event => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("drop").hidden = type === "drop" || type === "dragleave" && !event.relatedTarget;
    if (type === "drop") addFiles(event.dataTransfer.files);
  });
}
$("chat").onscroll = ({target}) => { atEnd = target.scrollHeight - target.scrollTop - target.clientHeight < 40; };
for (const element of [$("chat"), $("messages")]) new ResizeObserver(scrollDown).observe(element);

for (const element of document.querySelectorAll("[data-icon]")) element.prepend(icon(element.dataset.icon));
$("examples").append(...EXAMPLES.map((question, index) => make("li", {},
  make("button", {type: "button", lang: "en", onclick: () => example(index)},
    make("img", {src: `examples/${index + 1}.jpg`, alt: "", width: 160, height: 160}), make("span", {}, question)))));
restore();
showTheme();
showLanguage();
loadModels();
if (matchMedia("(pointer: fine)").matches) $("question").focus();
