// The page of a run: asks every few seconds what the folder holds and redraws the sections that changed.
const EVERY = 4000; // milliseconds
const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...inner) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inner);
  return element;
};
const address = (file) => "/files/" + file.path.split("/").map(encodeURIComponent).join("/") + "?v=" + file.version;
const moving = (file) => /\.(mp4|webm)$/i.test(file.path);
const table = (rows) => make("table", {}, make("tbody", {}, ...rows.map(([key, value]) =>
  make("tr", {}, make("th", { textContent: key }), make("td", { textContent: value })))));
const media = (file) => moving(file)
  ? make("video", { src: address(file), muted: true, loop: true, autoplay: true, playsInline: true,
    onpointerenter: (event) => { event.target.controls = true; }, onpointerleave: (event) => { event.target.controls = false; } })
  : make("img", { src: address(file), alt: file.path, loading: "lazy" });
const linked = (file) => moving(file) ? media(file) : make("a", { href: address(file), target: "_blank" }, media(file));
const figure = (file) => make("figure", {}, linked(file), make("figcaption", { textContent: [file.path, ...file.facts.map((fact) => fact.join(" "))].join(" · ") }));

const drawn = {}; // what each section shows
function section(id, data, draw) {
  const text = JSON.stringify(data);
  if (drawn[id] === text) return;
  drawn[id] = text;
  $(id).hidden = data.length === 0;
  draw(data);
}

function options(select, names, wanted) {
  select.replaceChildren(...names.map((name) => make("option", { textContent: name, value: name })));
  select.value = names.includes(wanted) ? wanted : names[0];
  select.hidden = names.length < 2;
}

// Turn it: one model at a time, in the viewer of its kind.

let turning = null; // how to end the viewer that is there
let turned = 0; // its number: loading takes time, and only the last one asked for may appear

async function showModel(file) {
  const mine = ++turned;
  turning?.();
  turning = null;
  $("turn").replaceChildren();
  $("textures").replaceChildren();
  $("facts").replaceChildren(table(file.facts));
  $("said").textContent = "loading …";
  delete document.body.dataset.shown;
  try {
    turning = await (file.kind === "splat" ? splat(file, () => mine === turned) : mesh(file, () => mine === turned));
    if (mine !== turned) return;
    $("said").replaceChildren("drag to turn, scroll to come nearer · ", make("a", { href: address(file), download: "", textContent: "download" }));
    document.body.dataset.shown = file.path;
  } catch (error) {
    if (mine === turned) $("said").textContent = "cannot be shown here: " + (error?.message ?? error);
  }
}

async function mesh(file, wanted) {
  await import("/vendor/model-viewer.min.js");
  if (!wanted()) return null;
  const viewer = make("model-viewer", { src: address(file), cameraControls: true, cameraOrbit: "30deg 75deg auto", shadowIntensity: 0.6, alt: file.path });
  viewer.setAttribute("interaction-prompt", "none");
  const loaded = new Promise((done, failed) => {
    viewer.addEventListener("load", done);
    viewer.addEventListener("error", (event) => failed(event.detail?.sourceError ?? new Error("the file is broken")));
  });
  $("turn").replaceChildren(viewer);
  await loaded;
  for (const material of viewer.model?.materials ?? []) {
    const found = { colour: material.pbrMetallicRoughness.baseColorTexture, normals: material.normalTexture,
      "metallic and roughness": material.pbrMetallicRoughness.metallicRoughnessTexture };
    for (const [what, slot] of Object.entries(found)) {
      if (!slot?.texture) continue;
      const source = await slot.texture.source.createThumbnail(512, 512);
      if (wanted()) $("textures").append(make("img", { src: source, className: "texture", title: "texture: " + what, alt: what }));
    }
  }
  return () => viewer.remove();
}

async function splat(file, wanted) {
  const gs = await import("/vendor/gsplat.js");
  if (!wanted()) return null;
  const canvas = make("canvas");
  $("turn").replaceChildren(canvas);
  const renderer = new gs.WebGLRenderer(canvas, []);
  renderer.backgroundColor = new gs.Color32(255, 255, 255);
  const scene = new gs.Scene();
  const found = await (/\.ply$/i.test(file.path) ? gs.PLYLoader : gs.Loader).LoadAsync(address(file), scene);
  // The viewer's own axes have y down and the front at -z: half a turn about x for files with y up, a quarter for z up.
  const up = Object.fromEntries(file.facts).up ?? "y";
  found.rotation = gs.Quaternion.FromEuler(new gs.Vector3(up === "z" ? Math.PI / 2 : Math.PI, 0, 0));
  found.applyRotation();
  found.recalculateBounds();
  const camera = new gs.Camera();
  const size = found.bounds.size(), radius = 1.4 * Math.hypot(size.x, size.y, size.z);
  const controls = new gs.OrbitControls(camera, canvas, 0.5, 0.25, radius, false, found.bounds.center());
  let going = true;
  const frame = () => {
    if (!going) return;
    camera.data.fx = camera.data.fy = 1.2 * canvas.clientHeight;
    renderer.resize();
    controls.update();
    renderer.render(scene, camera);
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
  return () => {
    going = false;
    controls.dispose();
    renderer.dispose();
  };
}

// Side by side: what was made of each prompt (files of one name), those of a training step under one slider.

function showSides(files) {
  const facts = (file) => Object.fromEntries(file.facts), name = (file) => file.path.split("/").pop();
  const steps = [...new Set(files.map((file) => file.step).filter((step) => step !== null))].sort((a, b) => a - b);
  const slider = $("sidestep"), last = steps.length - 1;
  const start = slider.value === slider.max ? last : slider.value;
  Object.assign(slider, { max: Math.max(last, 0), value: start, hidden: last < 1 });
  const side = (file) => make("figure", {}, linked(file), make("figcaption", { textContent: facts(file).title }));
  const cards = [...new Set(files.map(name))].sort().map((one) => {
    const own = files.filter((file) => name(file) === one), place = make("div", { className: "sides" });
    const fixed = own.filter((file) => file.step === null).map(side);
    const draw = () => place.replaceChildren(...fixed, ...own.filter((file) => file.step === steps[slider.value]).map(side));
    return { draw, card: make("div", {}, make("p", { textContent: facts(own[0]).prompt }), place) };
  });
  slider.oninput = () => {
    $("sidelabel").textContent = last < 0 ? "" : "step " + steps[slider.value].toLocaleString("en");
    cards.forEach((one) => one.draw());
    together("siderow");
  };
  $("siderow").replaceChildren(...cards.map((one) => one.card));
  slider.oninput();
}

async function together(row) {
  const clips = [...$(row).querySelectorAll("video")];
  await Promise.all(clips.map((clip) => clip.readyState > 2 || new Promise((done) => clip.addEventListener("canplay", done, { once: true }))));
  for (const clip of clips.filter((one) => one.isConnected)) {
    clip.currentTime = 0;
    clip.play().catch(() => {}); // it was replaced meanwhile
  }
}

// Compare steps: the same sheet at two steps, each under its slider.

function showSteps(files) {
  const last = files.length - 1;
  const moved = [...$("pair").querySelectorAll("input")].map((slider) => slider.value === slider.max ? null : Math.min(slider.value, last));
  $("pair").replaceChildren(...[moved[0] ?? 0, moved[1] ?? last].map((start) => {
    const slider = make("input", { type: "range", min: 0, max: last, value: start, ariaLabel: "step" });
    const label = make("label"), place = make("div");
    const draw = () => {
      const file = files[slider.value];
      label.textContent = "step " + file.step.toLocaleString("en");
      place.replaceChildren(linked(file));
    };
    slider.addEventListener("input", draw);
    draw();
    return make("div", {}, label, slider, place);
  }));
}

// What is asked again and again

function show(run) {
  document.title = run.name + " · " + run.run;
  for (const id of ["name", "about"]) $(id).textContent = run[id];
  $("run").textContent = "run " + run.run + (run.more ? " · only the first of its many files are shown" : "");
  $("error").hidden = !run.error;
  $("error").textContent = run.error;
  $("numbers").replaceChildren(...run.numbers.map(([key, value]) =>
    make("div", {}, make("dt", { textContent: key }), make("dd", { textContent: value }))));
  const of = (...kinds) => run.files.filter((file) => kinds.includes(file.kind));
  section("models", of("model", "splat"), (files) => {
    options($("which"), files.map((file) => file.path), $("which").value);
    const draw = () => files.length && showModel(files.find((file) => file.path === $("which").value));
    $("which").onchange = draw;
    draw();
  });
  section("sides", of("side"), showSides);
  section("steps", of("step"), (files) => {
    const folder = (file) => file.path.slice(0, file.path.lastIndexOf("/"));
    options($("series"), [...new Set(files.map(folder))], $("series").value);
    const draw = () => files.length && showSteps(files.filter((file) => folder(file) === $("series").value));
    $("series").onchange = draw;
    draw();
  });
  section("clips", of("clip"), (files) => $("cliprow").replaceChildren(...files.map(figure)));
  section("pictures", of("picture"), (files) => $("picturerow").replaceChildren(...files.map(figure)));
  section("tables", run.tables, (tables) => $("tablelist").replaceChildren(...tables.map(({ name, columns, rows }) =>
    make("div", { className: "wide" }, make("table", {}, make("caption", { textContent: name }),
      make("thead", {}, make("tr", {}, ...columns.map((column) => make("th", { textContent: column })))),
      make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", { textContent: cell }))))))))));
  section("files", run.files, (files) => $("filelist").replaceChildren(...files.map((file) => make("tr", {},
    make("td", {}, make("a", { href: address(file), download: "", textContent: file.path })),
    make("td", { textContent: file.bytes.toLocaleString("en") + " bytes" })))));
}

async function ask() {
  try {
    if (!document.hidden) show(await (await fetch("/run.json")).json());
  } catch {
    $("run").textContent = "limbeck view has ended; start it again to see the run";
  }
  setTimeout(ask, EVERY);
}

$("together").onclick = () => together("cliprow");
$("sidetogether").onclick = () => together("siderow");
ask();
