"use strict";
for (const box of document.querySelectorAll("[data-viewer]")) {
  const $ = (s) => box.querySelector(s);
  const stage = $("[data-stage]"), world = $("[data-world]"), split = $("[data-split]");
  const amount = $("[data-amount]"), under = $("[data-under]"), over = $("[data-over]");
  const place = JSON.parse(box.dataset.viewer);
  const layers = new Map();
  for (const img of world.querySelectorAll("img")) {
    if (img.dataset.from) img.src = document.getElementById(img.dataset.from).src;
    layers.set(img.dataset.layer, img);
  }
  let k = 1, x = 0, y = 0, mode = "fade", lit = 1;
  const size = () => stage.getBoundingClientRect();
  const held = () => {
    const r = size();
    k = Math.min(Math.max(k, 1), 32);
    x = Math.min(0, Math.max(x, r.width * (1 - k)));
    y = Math.min(0, Math.max(y, r.height * (1 - k)));
  };
  const scaleBar = () => {
    const metres = place.width_m / k / 4, power = 10 ** Math.floor(Math.log10(metres));
    const length = [5, 2, 1].find((n) => n * power <= metres) * power;
    $("[data-bar] span").textContent = length >= 1000 ? `${length / 1000} km` : `${length} m`;
    $("[data-bar] i").style.width = `${(100 * length * k) / place.width_m}%`;
  };
  const draw = () => {
    held();
    const r = size(), share = amount.value / 100;
    world.style.transform = `translate(${x}px,${y}px) scale(${k})`;
    world.classList.toggle("near", k > 2);
    stage.classList.toggle("zoomed", k > 1);
    for (const [name, img] of layers) {
      const top = name === over.value, low = name === under.value;
      img.hidden = !(top || low);
      img.style.zIndex = top ? 2 : 1;
      img.style.opacity = top && mode === "fade" ? share : 1;
      const at = (share * r.width - x) / k;
      img.style.clipPath = top && mode === "swipe" ? `inset(0 0 0 ${Math.max(at, 0)}px)` : "none";
    }
    split.hidden = mode !== "swipe";
    split.style.left = `${100 * share}%`;
    scaleBar();
  };
  const zoom = (factor, px, py) => {
    const before = k;
    k = Math.min(Math.max(k * factor, 1), 32);
    x = px - ((px - x) * k) / before;
    y = py - ((py - y) * k) / before;
    draw();
  };
  const centred = (factor) => zoom(factor, size().width / 2, size().height / 2);
  const home = () => { k = 1; x = y = 0; draw(); };
  box.querySelectorAll("[data-mode]").forEach((b) => b.addEventListener("click", () => {
    mode = b.dataset.mode;
    amount.value = mode === "swipe" ? 50 : 100;
    box.querySelectorAll("[data-mode]").forEach((o) => o.setAttribute("aria-pressed", o === b));
    draw();
  }));
  box.querySelectorAll("[data-zoom]").forEach((b) => b.addEventListener("click", () => {
    if (b.dataset.zoom === "home") home(); else centred(b.dataset.zoom === "in" ? 1.6 : 1 / 1.6);
  }));
  amount.addEventListener("input", draw);
  under.addEventListener("change", draw);
  over.addEventListener("change", draw);

  const fingers = new Map();
  let gap = 0, swiping = false;
  const local = (e) => { const r = size(); return [e.clientX - r.left, e.clientY - r.top]; };
  stage.addEventListener("pointerdown", (e) => {
    const [px] = local(e);
    swiping = mode === "swipe" && Math.abs(px - (amount.value / 100) * size().width) < 24;
    fingers.set(e.pointerId, [e.clientX, e.clientY]);
    if (k > 1 || swiping || fingers.size > 1) stage.setPointerCapture(e.pointerId);
    gap = 0;
  });
  const lift = (e) => { fingers.delete(e.pointerId); gap = 0; swiping = false; };
  stage.addEventListener("pointerup", lift);
  stage.addEventListener("pointercancel", lift);
  stage.addEventListener("pointermove", (e) => {
    probe(e);
    const was = fingers.get(e.pointerId);
    if (!was) return;
    fingers.set(e.pointerId, [e.clientX, e.clientY]);
    if (fingers.size === 2) {
      const [a, b] = [...fingers.values()], r = size();
      const now = Math.hypot(a[0] - b[0], a[1] - b[1]);
      if (gap) zoom(now / gap, (a[0] + b[0]) / 2 - r.left, (a[1] + b[1]) / 2 - r.top);
      gap = now;
    } else if (swiping) {
      amount.value = (100 * local(e)[0]) / size().width;
      draw();
    } else if (k > 1) {
      x += e.clientX - was[0];
      y += e.clientY - was[1];
      draw();
    }
  });
  stage.addEventListener("dblclick", (e) => zoom(2, ...local(e)));
  // The wheel scrolls the page, until the map has been clicked or Ctrl is held.
  stage.addEventListener("wheel", (e) => {
    if (document.activeElement !== stage && !e.ctrlKey) return;
    e.preventDefault();
    zoom(Math.exp(-e.deltaY / 400), ...local(e));
  }, { passive: false });
  stage.addEventListener("keydown", (e) => {
    const step = 60, moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (e.key === "+" || e.key === "=") centred(1.6);
    else if (e.key === "-") centred(1 / 1.6);
    else if (e.key === "0") home();
    else if (k > 1 && moves[e.key]) { x += moves[e.key][0]; y += moves[e.key][1]; draw(); }
    else return;
    e.preventDefault();
  });

  // What the pointer is on: the class is read back from the colour of the map's own picture.
  const names = new Map(place.legend.map(([color, name]) => [color, name]));
  const map = layers.get("classes"), canvas = document.createElement("canvas");
  let pen = null;
  const pixels = () => {
    if (!pen && map.complete && map.naturalWidth) {
      canvas.width = map.naturalWidth;
      canvas.height = map.naturalHeight;
      pen = canvas.getContext("2d", { willReadFrequently: true });
      pen.drawImage(map, 0, 0);
    }
    return pen;
  };
  function probe(e) {
    const r = size(), [px, py] = local(e);
    const u = (px - x) / k / r.width, v = (py - y) / k / r.height;
    if (u < 0 || v < 0 || u >= 1 || v >= 1 || !pixels()) return;
    const [red, green, blue, alpha] = pen.getImageData(
      Math.floor(u * canvas.width), Math.floor(v * canvas.height), 1, 1).data;
    const hex = "#" + [red, green, blue].map((n) => n.toString(16).padStart(2, "0")).join("");
    const what = alpha ? names.get(hex) || "" : "no class";
    const east = Math.round(place.left + u * place.width_m), north = Math.round(place.top - v * place.height_m);
    $("[data-probe]").textContent = `${what} · E ${east} N ${north}`;
  }
  box.querySelectorAll("[data-controls]").forEach((c) => { c.hidden = false; });
  stage.tabIndex = 0;
  new ResizeObserver(draw).observe(stage);
  draw();
}
