// The page of a server: asks for clips, shows them while they are made, and plays them.

const $ = (id) => document.getElementById(id);
const form = $("compose");
const field = (name) => form.elements[name];
const cards = new Map(); // id of a job -> its card, and what it shows
const zones = new Map(); // element -> the condition that it takes, and the file that it has
const WORDS = {
  image: "First frame", last_image: "Last frame", keyframes: "Keyframe", references: "To appear",
  prefix: "Beginning", suffix: "End", video: "Footage to follow or keep", mask: "Mask of it",
  edges: "Edges to follow", guide: "Guide to follow", camera: "Camera path", restyle: "To make anew", interpolate: "Half the rate", upscale: "Half the size",
  from_video: "Picture to give sound", from_sound: "Sound to give a picture",
};
// What goes with the file of a condition: its label, and its bounds.
const NUMBERS = {
  keyframes: ["Seconds", { min: 0, step: "any" }],
  restyle: ["How far, 0 to 1", { min: 0, max: 1, step: "any" }],
};
const MOST = 16; // files of a condition
const MINE = "application/x-jvdit-video";
let model = null;
let oldest = null;

async function ask(path, options = {}) {
  const token = localStorage.getItem("token");
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await newToken();
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `The server answered ${answer.status}.`);
  }
  return answer;
}

let asking = null;
function newToken() {
  asking ??= new Promise((resolve) => {
    const gate = $("gate");
    gate.addEventListener("close", () => {
      localStorage.setItem("token", $("token").value);
      asking = null;
      resolve();
    }, { once: true });
    gate.showModal();
  });
  return asking;
}

// Media can't send a token, so with one they are fetched first.
async function source(path) {
  if (!localStorage.getItem("token")) return path;
  return URL.createObjectURL(await (await ask(path)).blob());
}

function toast(text) {
  const place = $("toast");
  place.textContent = text;
  place.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (place.hidden = true), 2500);
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // pages that aren't served from this machine may not
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(`${what} copied.`);
}

// What is asked

function drawForm() {
  const { defaults, limits, unit, period, conditions } = model;
  $("model").textContent = model.id;
  const [width, height] = defaults.size.split("x");
  for (const name of ["width", "height"]) Object.assign(field(name), { min: unit, step: unit });
  Object.assign(field("num_frames"), { min: 1, step: period });
  field("num_inference_steps").max = limits.num_inference_steps;
  fill({ ...defaults, width, height });
  $("sound").hidden = !model.sound;
  $("conditions").hidden = !conditions.length;
  const order = Object.keys(WORDS);
  conditions.sort((a, b) => order.indexOf(a.name) - order.indexOf(b.name));
  for (const condition of conditions) if (condition.accepts.includes("/")) drawZone(condition);
  $("more-zones").hidden = !$("films").childElementCount;
  const saved = sessionStorage.getItem("form");
  if (saved) fill(JSON.parse(saved));
}

function fill(values) {
  for (const [name, value] of Object.entries(values)) {
    const at = field(name);
    if (at && at.type === "checkbox") at.checked = value;
    else if (at) at.value = value ?? "";
  }
}

function accepts(condition, type) {
  return condition.accepts.split(",").some((kind) => type.startsWith(kind.replace("*", "")));
}

function called(condition) {
  return (WORDS[condition?.name] ?? condition?.name ?? "") + (condition?.needed ? " (needed)" : "");
}

// Pictures are at hand; clips and sounds are folded away, unless one is needed.
function drawZone(condition, after = null) {
  const zone = $("zone").content.firstElementChild.cloneNode(true);
  const input = zone.querySelector("input");
  zone.dataset.name = condition.name;
  zone.querySelector(".name").textContent = called(condition);
  input.accept = condition.accepts;
  input.addEventListener("change", () => input.files[0] && give(zone, input.files[0]));
  zone.querySelector("button").addEventListener("click", () => give(zone, null));
  for (const name of ["dragenter", "dragover"]) {
    zone.addEventListener(name, (event) => {
      event.preventDefault();
      zone.classList.add("over");
    });
  }
  zone.addEventListener("dragleave", () => zone.classList.remove("over"));
  zone.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    const id = event.dataTransfer.getData(MINE);
    const file = event.dataTransfer.files[0];
    if (id) giveClip(zone, id);
    else if (file) give(zone, file);
  });
  const [label, bounds] = NUMBERS[condition.name] ?? [];
  if (label) {
    const number = zone.querySelector(".number");
    number.firstElementChild.textContent = label;
    Object.assign(number.lastElementChild, bounds);
  }
  zones.set(zone, { condition, file: null });
  const pictures = condition.accepts === "image/*" || condition.needed;
  if (after) after.after(zone);
  else $(pictures ? "zones" : "films").append(zone);
}

// The number that goes with a file, at first: the middle of the clip, or the model's own.
function usual(condition) {
  if (condition.name === "restyle") return model.defaults.strength;
  const frames = Math.floor((Number(field("num_frames").value) - 1) / 2);
  return Number((Math.max(frames, 0) / Number(field("fps").value)).toFixed(3));
}

function give(zone, file) {
  const { condition } = zones.get(zone);
  const picture = zone.querySelector("img");
  if (file && !accepts(condition, file.type)) {
    tell(`${file.name || "This"} is ${file.type || "of an unknown kind"}; ${WORDS[condition.name] ?? condition.name} takes ${condition.accepts}.`);
    return;
  }
  tell("");
  URL.revokeObjectURL(picture.src);
  const shown = file && file.type.startsWith("image/");
  picture.hidden = !shown;
  if (shown) picture.src = URL.createObjectURL(file);
  else picture.removeAttribute("src");
  zone.querySelector(".name").textContent = file ? `${WORDS[condition.name] ?? condition.name} · ${file.name}` : called(condition);
  zone.querySelector("button").hidden = !file;
  zone.querySelector("input").value = "";
  const number = zone.querySelector(".number");
  number.hidden = !file || !NUMBERS[condition.name];
  number.lastElementChild.required = !number.hidden;
  if (!number.hidden && !zones.get(zone).file) number.lastElementChild.value = usual(condition);
  zones.set(zone, { condition, file });
  if (!condition.several) return;
  const alike = [...zones].filter(([, x]) => x.condition === condition);
  const empty = alike.filter(([, x]) => !x.file);
  if (!empty.length && alike.length < MOST) drawZone(condition, zone);
  for (const [other] of empty.slice(0, -1)) {
    zones.delete(other);
    other.remove();
    empty.at(-1)[0].querySelector("input").focus();
  }
}

// A clip of the gallery as a condition: the frame that it stands at, or all of it.
async function giveClip(zone, id) {
  const { condition } = zones.get(zone);
  try {
    const clip = await (await ask(`/v1/videos/${id}/content`)).blob();
    if (condition.accepts !== "image/*") {
      const type = accepts(condition, "video/mp4") ? "video/mp4" : "audio/mp4";
      give(zone, new File([clip], "from the gallery", { type }));
      return;
    }
    const at = cards.get(id)?.element.querySelector("video").currentTime ?? 0;
    const film = document.createElement("video");
    film.muted = true;
    film.src = URL.createObjectURL(clip);
    await new Promise((done, fail) => {
      film.onseeked = done;
      film.onerror = () => fail(new Error("The clip can't be read."));
      film.onloadeddata = () => (film.currentTime = at);
    });
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [film.videoWidth, film.videoHeight];
    canvas.getContext("2d").drawImage(film, 0, 0);
    URL.revokeObjectURL(film.src);
    const picture = await new Promise((done) => canvas.toBlob(done, "image/png"));
    give(zone, new File([picture], "from the gallery.png", { type: "image/png" }));
    zone.querySelector("input").focus();
  } catch (error) {
    tell(error.message);
  }
}

function tell(text) {
  $("told").textContent = text;
}

function values() {
  const named = Object.fromEntries(new FormData(form));
  named.sound = field("sound").checked;
  return named;
}

async function submit(event) {
  event?.preventDefault();
  if (!form.reportValidity()) return;
  const asked = values();
  sessionStorage.setItem("form", JSON.stringify(asked));
  const { width, height, clips, seed, sound, ...fields } = asked;
  const many = Number(clips);
  $("make").disabled = true;
  tell("");
  try {
    for (let i = 0; i < many; i += 1) {
      const body = new FormData();
      for (const [name, value] of Object.entries(fields)) body.append(name, value);
      body.append("size", `${width}x${height}`);
      if (seed !== "") body.append("seed", (Number(seed) + i) % 2 ** 32);
      const anew = [...zones.values()].some((x) => x.file && x.condition.name === "restyle");
      if (model.sound && !anew) body.append("sound", sound);
      for (const [zone, { condition, file }] of zones) {
        if (!file) continue;
        const number = zone.querySelector(".number input").value;
        const { name } = condition;
        const place = condition.timed ? `[${number}]` : condition.several ? "[]" : "";
        body.append(`conditions[${name}]${place}`, file);
        if (name === "restyle") body.append("strength", number);
      }
      show(await (await ask("/v1/videos", { method: "POST", body })).json(), true);
    }
  } catch (error) {
    tell(error.message);
  }
  $("make").disabled = false;
  look();
}

// What is made

function show(job, first = false) {
  let card = cards.get(job.id);
  if (!card) {
    const element = $("card").content.firstElementChild.cloneNode(true);
    element.id = job.id;
    card = { element, job: {} };
    cards.set(job.id, card);
    $("gallery")[first ? "prepend" : "append"](element);
    drawCard(card, job);
  }
  update(card, job);
  $("empty").hidden = cards.size > 0;
}

function drawCard({ element }, job) {
  const { settings, size } = job;
  const [width, height] = size.split("x");
  element.querySelector(".stage").style.setProperty("--shape", Math.min(Math.max(width / height, 0.6), 2.2));
  element.querySelector(".words").textContent = job.prompt;
  element.querySelector(".words").title = job.prompt;
  const sound = settings.sound ? " · sound" : "";
  element.querySelector(".facts").textContent =
    `${width} × ${height} · ${settings.num_frames} frames · ${settings.num_inference_steps} steps · seed ${settings.seed}${sound}`;
  element.addEventListener("click", (event) => act(event.target.dataset.do, cards.get(job.id)));
  element.addEventListener("dragstart", (event) => event.dataTransfer.setData(MINE, job.id));
}

async function update(card, job) {
  const before = card.job;
  card.job = job;
  const { element } = card;
  const part = (name) => element.querySelector(name);
  const over = job.status === "completed" || job.status === "failed";
  element.classList.toggle("failed", job.status === "failed");
  part("progress").hidden = job.status !== "in_progress";
  part("progress").value = job.progress;
  part("progress").setAttribute("aria-label", `${job.progress} % are made`);
  part(".state").textContent = { queued: "waits", in_progress: job.preview ? "" : "begins …", failed: job.error?.message }[job.status] ?? "";
  part("[data-do=remove]").textContent = over ? "Remove" : "Cancel";
  part("[data-do=give]").hidden = job.status !== "completed" || !model.conditions.length;
  part("[data-do=give]").textContent = `As ${named(target())}`;
  element.draggable = job.status === "completed";
  const emerging = part(".emerging");
  if (job.status === "in_progress" && job.preview && before.progress !== job.progress) {
    const url = await source(`/v1/videos/${job.id}/preview?at=${job.progress}`).catch(() => null);
    if (url && card.job.status === "in_progress") {
      URL.revokeObjectURL(emerging.src);
      emerging.alt = "What can be seen so far";
      emerging.src = url;
      emerging.hidden = false;
    }
  }
  if (job.status === "completed" && before.status !== "completed") {
    const film = part("video");
    film.setAttribute("aria-label", job.prompt);
    film.addEventListener("loadeddata", () => (emerging.hidden = true), { once: true });
    film.poster = await source(`/v1/videos/${job.id}/content?variant=thumbnail`);
    film.src = await source(`/v1/videos/${job.id}/content`);
    film.hidden = false;
    if (before.status && !matchMedia("(prefers-reduced-motion: reduce)").matches) {
      film.muted = true; // browsers play by themselves only what is silent
      film.play().catch(() => {});
      film.addEventListener("click", () => (film.muted = false), { once: true });
    }
  }
}

// The zone that a clip of the gallery goes to by its button: the first for a picture.
function target() {
  const all = [...zones];
  return (all.find(([, x]) => x.condition.accepts === "image/*") ?? all[0])?.[0];
}

function named(zone) {
  const { condition } = zones.get(zone) ?? {};
  return (WORDS[condition?.name] ?? condition?.name ?? "").toLowerCase();
}

async function act(what, card) {
  const { job, element } = card;
  if (what === "reuse") {
    const [width, height] = job.size.split("x");
    fill({ ...job.settings, prompt: job.prompt, width, height });
    field("prompt").focus();
  } else if (what === "give") {
    giveClip(target(), job.id);
  } else if (what === "link") {
    await copy(`${location.origin}/#${job.id}`, "Link");
  } else if (what === "command") {
    await copy(job.command, "Command");
  } else if (what === "python") {
    await copy(job.python, "Python");
  } else if (what === "remove") {
    await ask(`/v1/videos/${job.id}`, { method: "DELETE" }).catch((error) => toast(error.message));
    forget(job.id);
    const next = $("gallery").querySelector("button");
    if (!element.isConnected) (next ?? field("prompt")).focus();
  }
}

function forget(id) {
  cards.get(id)?.element.remove();
  cards.delete(id);
  $("empty").hidden = cards.size > 0;
}

async function look() {
  clearTimeout(look.timer);
  let busy = false;
  try {
    const health = await (await fetch("/health")).json();
    const { status, queued, in_progress } = health;
    $("health").className = status === "stopped" ? "bad" : status === "ok" ? "ok" : "";
    $("health").textContent = queued + in_progress ? `${in_progress} in work, ${queued} wait` : status === "ok" ? "ready" : status;
    busy = queued + in_progress > 0 || status !== "ok";
    const list = await (await ask("/v1/videos?limit=50")).json();
    for (const job of list.data.toReversed()) show(job, true);
    const ids = new Set(list.data.map((job) => job.id));
    for (const [id, { job }] of [...cards]) {
      if (!ids.has(id) && job.status !== "completed" && job.status !== "failed") await refresh(id);
    }
    if (oldest === null && list.has_more) {
      oldest = list.last_id;
      $("older").hidden = false;
    }
  } catch {
    $("health").className = "bad";
    $("health").textContent = "the server doesn't answer";
  }
  look.timer = setTimeout(look, document.hidden ? 5000 : busy ? 600 : 3000);
}

async function refresh(id) {
  await ask(`/v1/videos/${id}`).then(async (x) => show(await x.json()), () => forget(id));
}

async function older() {
  const list = await (await ask(`/v1/videos?limit=50&after=${oldest}`)).json();
  for (const job of list.data) show(job);
  oldest = list.last_id;
  $("older").hidden = !list.has_more;
}

async function follow() {
  const id = location.hash.slice(1);
  if (!/^video_\w+$/.test(id)) return;
  if (!cards.has(id)) await ask(`/v1/videos/${id}`).then(async (x) => show(await x.json(), true), () => toast("That clip is gone."));
  document.querySelector(".shown")?.classList.remove("shown");
  const element = cards.get(id)?.element;
  element?.classList.add("shown");
  element?.scrollIntoView({ block: "center" });
  element?.focus({ preventScroll: true });
}

form.addEventListener("submit", submit);
form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
});
document.addEventListener("paste", (event) => {
  const file = event.clipboardData.files[0];
  const fits = file && [...zones].find(([, x]) => accepts(x.condition, file.type) && !x.file);
  if (fits) give(fits[0], file);
});
$("older").addEventListener("click", older);
addEventListener("hashchange", follow);
document.addEventListener("visibilitychange", () => document.hidden || look());

async function begin() {
  try {
    model = (await (await ask("/v1/models")).json()).data[0];
  } catch {
    $("health").className = "bad";
    $("health").textContent = "the server doesn't answer";
    setTimeout(begin, 3000);
    return;
  }
  drawForm();
  await look();
  await follow();
}
begin();
