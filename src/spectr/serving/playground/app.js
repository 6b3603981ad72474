// The page: puts settings, conversation and detail together.

import { listModels } from "./api.js";
import { Choices } from "./choices.js";
import { Detail } from "./detail.js";
import { find, make } from "./dom.js";
import { say } from "./speak.js";
import { Talk } from "./talk.js";

const SAMPLES = [
  "Is the sentiment of this movie review positive or negative?\n\nA dull, lifeless film.",
  "What is this news article about: the world, sports, business or science and technology?\n\nThe striker scored twice in the last ten minutes.",
  "Explain in two sentences why the sky is blue.",
];

const detail = new Detail();
const wide = matchMedia("(min-width: 860px)");
const choices = new Choices({ onKey: load });
const talk = new Talk(choices, detail);

async function load() {
  try {
    choices.show(await listModels(choices.key));
    choices.complain("");
  } catch (error) {
    choices.show([]);
    choices.complain(error.message);
    if (error.status === 401) find("key").focus();
  }
}

async function ask() {
  const question = find("question").value.trim();
  if (!question || talk.busy) return;
  if (choices.obstacle) return object(choices.obstacle);
  find("empty").hidden = true;
  find("settings").open = wide.matches;
  find("question").value = "";
  busy(true);
  const stay = stayAtEnd();
  const answered = await talk.ask(question);
  stay.end();
  busy(false);
  if (!answered && find("empty").hidden && !find("question").value) find("question").value = question; // to be asked again
}

function object(words) {
  say(words);
  find("settings").open = true;
  find("advice").scrollIntoView({ block: "nearest" });
}

function busy(now) {
  find("send").hidden = now;
  find("stop").hidden = !now;
}

/** Keep the newest line in sight while an answer grows, unless the reader has scrolled away. */
function stayAtEnd() {
  const page = document.scrollingElement;
  const end = () => (page.scrollTop = page.scrollHeight);
  let near = true;
  let last = page.scrollTop;
  const look = () => {
    if (page.scrollHeight - page.scrollTop - innerHeight < 80) near = true;
    else if (page.scrollTop < last) near = false; // the reader, not a line that has come since
    last = page.scrollTop;
  };
  const watch = new ResizeObserver(() => near && end());
  watch.observe(find("talk"));
  addEventListener("scroll", look, { passive: true });
  end();
  const leave = () => {
    if (near) end(); // what was drawn last
    watch.disconnect();
    removeEventListener("scroll", look);
  };
  return { end: () => requestAnimationFrame(() => requestAnimationFrame(leave)) };
}

function pressed(event) {
  const plain = event.key === "Enter" && !event.shiftKey && !event.isComposing;
  if (!plain || matchMedia("(pointer: coarse)").matches) return; // on a phone Enter is a new line
  event.preventDefault();
  ask();
}

function fresh() {
  detail.close();
  talk.clear();
  find("empty").hidden = false;
  find("question").focus();
}

/** A sample goes into the question field, to be changed or sent. */
function sample(text) {
  const button = make("button", { type: "button" }, text.split("\n")[0]);
  button.addEventListener("click", () => {
    find("question").value = text;
    find("question").focus();
  });
  return make("li", {}, button);
}

/** Next to the conversation if there is room; on a phone, folded above it. */
function fold() {
  const set = () => (find("settings").open = wide.matches);
  wide.addEventListener("change", set);
  set();
}

find("ask").addEventListener("submit", event => (event.preventDefault(), ask()));
find("question").addEventListener("keydown", pressed);
find("stop").addEventListener("click", () => (talk.stop(), find("question").focus()));
find("fresh").addEventListener("click", fresh);
find("samples").append(...SAMPLES.map(sample));
document.addEventListener("keydown", event => event.key === "Escape" && detail.close());
fold();
load();
