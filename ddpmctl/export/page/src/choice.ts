// The choice of labels: a table of colours and shapes where labels are made of these, else a list of names.

import type { PageData } from "./model.ts";

const SVG = "http://www.w3.org/2000/svg";
const SEARCH_FROM = 30; // labels: a longer list has a field that filters it

/** Drawings of shapes, in a square of 24: a body, and what lies in light and in shadow. Other words stand as text. */
const SHAPES: Record<string, { body: string; light: string; shadow: string }> = {
  cube: { body: "M4 8 12 4 20 8 20 17 12 21 4 17Z", light: "M4 8 12 4 20 8 12 12Z", shadow: "M12 12 20 8 20 17 12 21Z" },
  sphere: { body: "M12 3a9 9 0 1 0 0 18a9 9 0 1 0 0-18Z", light: "M9 6a3.4 3.4 0 1 0 0 6.8a3.4 3.4 0 1 0 0-6.8Z", shadow: "M18.4 5.6a9 9 0 0 1-12.8 12.8a11 11 0 0 0 12.8-12.8Z" },
  cylinder: { body: "M5 7a7 3 0 0 1 14 0V17a7 3 0 0 1-14 0Z", light: "M5 7a7 3 0 0 1 14 0a7 3 0 0 1-14 0Z", shadow: "M14 9.9a7 3 0 0 0 5-2.9V17a7 3 0 0 1-5 2.9Z" },
};

/** Fill a group with one button for each label, and call `changed` with the chosen ones, in the order of the data. */
export function labelChoice(group: HTMLElement, data: PageData, changed: (labels: string[]) => void): void {
  const chosen = new Set(data.first);
  const report = (): void => changed(data.labels.filter((label) => chosen.has(label)));
  const table = data.aspects.length === 2;
  const buttons = ordered(data).map((label) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(chosen.has(label)));
    button.setAttribute("aria-label", label);
    button.title = label;
    button.append(table ? picture(label.split(" ")) : label);
    button.addEventListener("click", () => {
      if (!chosen.delete(label)) chosen.add(label);
      button.setAttribute("aria-pressed", String(chosen.has(label)));
      report();
    });
    return button;
  });
  const place = document.createElement("div");
  place.className = table ? "table" : "names";
  const columns = table ? data.aspects[0].words.length : 1;
  if (table) place.style.setProperty("--columns", String(columns));
  place.append(...buttons);
  place.addEventListener("keydown", (event) => {
    const moves: Record<string, number> = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const visible = buttons.filter((button) => !button.hidden);
    const target = visible[visible.indexOf(document.activeElement as HTMLButtonElement) + moves[event.key]];
    if (!target) return;
    event.preventDefault();
    target.focus();
  });
  if (data.labels.length > SEARCH_FROM) group.append(filter(buttons));
  group.append(place);
  report();
}

/** Return the labels row by row: a row for each shape, a column for each colour. */
function ordered(data: PageData): string[] {
  if (data.aspects.length !== 2) return data.labels;
  const [colours, shapes] = data.aspects.map((aspect) => aspect.words);
  return shapes.flatMap((shape) => colours.map((colour) => `${colour} ${shape}`)).filter((label) => data.labels.includes(label));
}

function filter(buttons: HTMLButtonElement[]): HTMLElement {
  const label = document.createElement("label");
  const field = document.createElement("input");
  field.type = "search";
  field.addEventListener("input", () => {
    const wanted = field.value.trim().toLowerCase();
    for (const button of buttons) {
      const pressed = button.getAttribute("aria-pressed") === "true";
      button.hidden = !pressed && !button.title.toLowerCase().includes(wanted);
    }
  });
  label.append("Find ", field);
  return label;
}

function picture([colour, shape]: string[]): Node {
  const drawing = SHAPES[shape];
  if (!drawing || !CSS.supports("color", colour)) return document.createTextNode(`${colour} ${shape}`);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const parts: [string, string, number][] = [[drawing.body, colour, 1], [drawing.light, "white", 0.35], [drawing.shadow, "black", 0.25]];
  for (const [outline, fill, opacity] of parts) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", outline);
    path.setAttribute("fill", fill);
    path.setAttribute("fill-opacity", String(opacity));
    svg.append(path);
  }
  return svg;
}
