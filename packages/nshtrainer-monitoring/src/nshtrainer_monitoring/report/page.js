"use strict";
// Shows the values under the pointer; the page says the same without it.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const numbers = (text) => text.split(" ").map(Number);
  const points = new WeakMap();

  function pointsOf(path) {
    if (!points.has(path)) {
      points.set(path, path.getAttribute("d").split(/[ML]/).slice(1).map(numbers));
    }
    return points.get(path);
  }

  function nearest(list, x) {
    let low = 0, high = list.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle][0] < x) low = middle + 1; else high = middle;
    }
    return low > 0 && x - list[low - 1][0] < list[low][0] - x ? list[low - 1] : list[low];
  }

  function shown(value, span, log) {
    if (log) return value.toPrecision(3).replace(/e\+?(-?)/, "e$1");
    const digits = Math.ceil(-Math.log10(span / 500));
    if (Math.abs(value) >= 1e6 || span < 1e-4) return value.toExponential(3).replace("e+", "e");
    return value.toFixed(Math.min(Math.max(digits, 0), 8));
  }

  function attach(svg) {
    const [x0, x1, y0, y1, log] = numbers(svg.dataset.scale);
    const [left, top, width, height] = numbers(svg.dataset.box);
    const cursor = svg.querySelector(".cursor");
    const figure = svg.closest("figure");
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    const hide = () => { tip.hidden = true; cursor.setAttribute("hidden", ""); };

    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const scale = svg.viewBox.baseVal.width / box.width;
      const x = (event.clientX - box.left) * scale;
      if (x < left - 4 || x > left + width + 4) return hide();
      const found = [...svg.querySelectorAll(".curve")].map((path) => [path, nearest(pointsOf(path), x)]);
      if (!found.length) return hide();
      const at = found.reduce((a, b) => (Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a))[1][0];
      cursor.removeAttribute("hidden");
      cursor.firstElementChild.setAttribute("transform", `translate(${at} 0)`);
      cursor.querySelectorAll("circle").forEach((c) => c.remove());
      const lines = [document.createElement("div")];
      const step = x0 + ((at - left) / width) * (x1 - x0);
      lines[0].textContent = `step ${Math.round(step).toLocaleString("en")}`;
      for (const [path, [px, py]] of found) {
        const share = 1 - (py - top) / height;
        const value = log ? 10 ** (Math.log10(y0) + share * (Math.log10(y1) - Math.log10(y0))) : y0 + share * (y1 - y0);
        const color = getComputedStyle(path).stroke;
        const dot = document.createElementNS(SVG, "circle");
        dot.setAttribute("cx", px); dot.setAttribute("cy", py); dot.setAttribute("r", 4);
        dot.style.fill = color;
        cursor.append(dot);
        const line = document.createElement("div");
        const bullet = document.createElement("i");
        bullet.style.color = color;
        const bold = document.createElement("b");
        bold.textContent = shown(value, y1 - y0, log);
        line.append(bullet, `${path.dataset.label} `, bold);
        lines.push(line);
      }
      tip.replaceChildren(...lines);
      tip.hidden = false;
      const area = figure.getBoundingClientRect();
      const place = box.left - area.left + at / scale;
      const flips = place > area.width / 2;
      tip.style.left = flips ? "auto" : `${place + 14}px`;
      tip.style.right = flips ? `${area.width - place + 14}px` : "auto";
      tip.style.top = `${box.top - area.top + top / scale + 6}px`;
    });
  }

  document.querySelectorAll("svg[data-scale]").forEach(attach);
})();
