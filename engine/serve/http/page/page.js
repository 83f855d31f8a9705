// The page of a Twinstream server: a form, the events of what it asks for, and the pictures that came.
const $ = (id) => document.getElementById(id);
const sliders = ["steps", "guidance_scale", "strength", "concept_strength"];
let concepts = [];
let running = null; // AbortController of the request that is drawn
let token = sessionStorage.getItem("token") || "";

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(token && { Authorization: `Bearer ${token}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) {
    await login();
    return ask(path, options);
  }
  if (!answer.ok) {
    const body = await answer.json().catch(() => null);
    throw new Error(body?.error?.message ?? `the server answered ${answer.status}`);
  }
  return answer;
}

function login() {
  return new Promise((done) => {
    const dialog = $("login");
    dialog.addEventListener("close", () => {
      token = $("token").value;
      sessionStorage.setItem("token", token);
      done();
    }, { once: true });
    if (!dialog.open) dialog.showModal();
  });
}

function fail(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
}

async function readAbout() {
  const about = await (await ask("v1/about")).json();
  const name = about.model.split("/").pop();
  $("about").textContent = `${name} on ${about.device} in ${about.dtype}`;
  $("sampler").replaceChildren(...about.samplers.map((one) => new Option(one, one)));
  $("steps").max = Math.min(100, about.limits.steps);
  $("count").max = about.limits.images;
  for (const side of ["width", "height"]) {
    $(side).step = about.factor;
    $(side).min = about.factor;
    $(side).placeholder = about.size;
  }
  showValues();
}

async function readConcepts(chosen = $("concept").value) {
  concepts = (await (await ask("v1/concepts")).json()).concepts;
  const named = (one) => `${one.name} (${one.placeholder ? `${one.placeholder} ${one.noun}` : one.noun}, ${one.method})`;
  $("concept").replaceChildren(new Option("none", ""), ...concepts.map((one) => new Option(named(one), one.name)));
  $("concept").value = concepts.some((one) => one.name === chosen) ? chosen : "";
  showConcept();
}

const concept = () => concepts.find((one) => one.name === $("concept").value);

function showConcept() {
  const one = concept();
  const word = one?.placeholder ? `${one.placeholder} ${one.noun}` : one?.noun;
  $("concept-options").hidden = $("foundation-box").hidden = one?.method !== "infusion";
  $("remove").hidden = !one?.can_be_deleted;
  $("concept-hint").textContent = one
    ? `Write "${word}" in your text: it gets the look of ${one.name}.`
    : "A concept gives a noun of your text the look that it has learned.";
}

function showValues() {
  for (const id of sliders) $(`${id}_value`).textContent = Number($(id).value).toFixed(id === "steps" ? 0 : 2);
}

async function wanted() {
  const body = { prompt: $("prompt").value, mode: "stream", previews: 12 };
  body.steps = Number($("steps").value);
  body.guidance_scale = Number($("guidance_scale").value);
  body.sampler = $("sampler").value;
  body.images_per_prompt = Number($("count").value);
  for (const id of ["seed", "width", "height"]) if ($(id).value !== "") body[id] = Number($(id).value);
  if ($("negative_prompt").value && body.guidance_scale > 1) body.negative_prompt = $("negative_prompt").value;
  const file = $("image").files[0];
  if (file) {
    body.image = await new Promise((done, wrong) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => wrong(reader.error);
      reader.readAsDataURL(file);
    });
    body.strength = Number($("strength").value);
  }
  const one = concept();
  if (one) {
    body.concepts = [one.name];
    if (one.method === "infusion") {
      body.concept_strength = Number($("concept_strength").value);
      body.foundation = $("foundation").value;
    }
  }
  return body;
}

// Server-sent events of an answer to POST, which EventSource cannot read.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const lines = text.slice(0, end).split("\n");
      text = text.slice(end + 2);
      const part = (name) => lines.filter((l) => l.startsWith(`${name}: `)).map((l) => l.slice(name.length + 2)).join("\n");
      yield [part("event"), JSON.parse(part("data"))];
    }
  }
}

function showProgress(state) {
  const share = state.total ? state.step / state.total : 0;
  $("bar").style.width = `${100 * share}%`;
  $("progress").textContent = state.position > 0
    ? `waiting, number ${state.position} in the queue`
    : state.step ? `step ${state.step} of ${state.total}` : "beginning ...";
  if (state.preview) {
    $("preview").src = `data:image/jpeg;base64,${state.preview}`;
    $("preview").hidden = false;
  }
}

function figure(data, format, caption, file) {
  const made = document.createElement("figure");
  const image = new Image();
  image.src = `data:image/${format};base64,${data}`;
  image.alt = caption;
  const words = document.createElement("figcaption");
  const link = document.createElement("a");
  link.href = image.src;
  link.download = file;
  link.textContent = "Save";
  words.append(`${caption} `, link);
  made.append(image, words);
  return made;
}

function showResult(out, body) {
  $("empty").hidden = true;
  out.images.forEach((data, i) => {
    const shot = document.createElement("article");
    shot.className = "shot";
    const seed = out.seeds[i];
    const base = out.foundation_images[i];
    shot.append(figure(data, out.format, base ? "with the concept" : `seed ${seed}`, `${seed}.${out.format}`));
    if (base) shot.append(figure(base, out.format, "the foundation", `${seed}-foundation.${out.format}`));
    const facts = document.createElement("p");
    facts.className = "facts hint";
    const used = body.concepts ? `, ${body.concepts[0]} at ${body.concept_strength ?? 1}` : "";
    facts.textContent = `${body.prompt} (seed ${seed}, ${out.settings.steps} steps, ${out.settings.sampler}${used}, ${out.timings.total.toFixed(1)} s) `;
    const again = document.createElement("button");
    again.className = "link";
    again.type = "button";
    again.textContent = "Use this seed";
    again.onclick = () => { $("seed").value = seed; $("prompt").focus(); };
    facts.append(again);
    shot.append(facts);
    $("gallery").prepend(shot);
  });
}

async function draw() {
  $("error").hidden = true;
  const body = await wanted();
  running = new AbortController();
  $("draw").disabled = true;
  $("cancel").hidden = $("now").hidden = false;
  $("preview").hidden = true;
  $("now").scrollIntoView({ block: "nearest", behavior: "smooth" });
  showProgress({ step: 0, total: 0, position: 0 });
  try {
    const answer = await ask("v1/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: running.signal,
    });
    let ended = false;
    for await (const [name, data] of events(answer)) {
      if (name === "progress") showProgress(data);
      if (name === "result") showResult(data, body);
      if (name === "error") throw new Error(data.error.message);
      ended ||= name === "result";
    }
    if (!ended) throw new Error("the server went away before the picture was there");
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  } finally {
    running = null;
    $("draw").disabled = false;
    $("cancel").hidden = $("now").hidden = true;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!running) draw().catch(fail);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("cancel").addEventListener("click", () => running?.abort());
$("concept").addEventListener("change", showConcept);
$("example").addEventListener("click", () => {
  $("prompt").value = concept() ? `a photo of a ${concept().placeholder ?? ""} ${concept().noun} on a beach`.replace("  ", " ") : "a photo of a red cat on a beach";
});
for (const id of sliders) $(id).addEventListener("input", showValues);
$("upload").addEventListener("change", async () => {
  const file = $("upload").files[0];
  if (!file) return;
  const name = file.name.replace(/\.safetensors$/, "").replace(/[^A-Za-z0-9_-]/g, "-").slice(0, 64);
  try {
    $("error").hidden = true;
    await ask(`v1/concepts/${encodeURIComponent(name)}`, { method: "PUT", body: file });
    await readConcepts(name);
  } catch (error) {
    fail(error);
  } finally {
    $("upload").value = "";
  }
});
$("remove").addEventListener("click", async () => {
  try {
    await ask(`v1/concepts/${encodeURIComponent($("concept").value)}`, { method: "DELETE" });
    await readConcepts("");
  } catch (error) {
    fail(error);
  }
});

showValues();
readAbout().then(() => readConcepts()).catch((error) => {
  $("about").textContent = "not connected";
  fail(error);
});
