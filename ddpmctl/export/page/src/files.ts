// Files to save: PNGs that carry their settings as text.

import type { Frame } from "./model.ts";

const SHEET_COLUMNS = 12;
const CELL = 128;
const MARGIN = 8;
const LINE = 18;

/** Draw a frame's image at its own size. */
export function drawn(pixels: Uint8ClampedArray<ArrayBuffer>): HTMLCanvasElement {
  const side = Math.sqrt(pixels.length / 4);
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  context(canvas).putImageData(new ImageData(pixels, side, side), 0, 0);
  return canvas;
}

/** Return which frames to show: the first, the last, and others even in log SNR where objects appear, none twice; `spread` of ddpmctl/sampling/trajectory.py. */
export function spread(visibility: number[], count: number): number[] {
  const last = visibility.length - 1;
  const [low, high] = [Math.min(...visibility), Math.max(...visibility)];
  const shown = [0];
  for (let number = 1; number < count - 1; number++) {
    const goal = low + ((high - low) * number) / (count - 1);
    const nearest = visibility.reduce((best, value, index) => (Math.abs(value - goal) < Math.abs(visibility[best] - goal) ? index : best), 0);
    shown.push(Math.min(Math.max(nearest, shown[number - 1] + 1), last - (count - 1 - number)));
  }
  return [...shown, last];
}

/** Draw some frames: for each model a row of x_t and a row of x0, with captions, and the settings below. */
export function sheet(
  models: { name: string; frames: Frame[] }[], visibility: number[], caption: (frame: number) => string, settings: string,
): HTMLCanvasElement {
  const columns = Math.min(SHEET_COLUMNS, visibility.length);
  const shown = spread(visibility, columns);
  const canvas = document.createElement("canvas");
  canvas.width = MARGIN + columns * (CELL + MARGIN);
  const lines = wrapped(settings, canvas.width - 2 * MARGIN);
  canvas.height = 2 * MARGIN + models.length * (LINE + 2 * (CELL + MARGIN)) + LINE + lines.length * LINE;
  const draw = context(canvas);
  draw.fillStyle = "white";
  draw.fillRect(0, 0, canvas.width, canvas.height);
  draw.imageSmoothingEnabled = false;
  draw.fillStyle = "black";
  draw.font = FONT;
  draw.textBaseline = "top";
  let top = MARGIN;
  for (const { name, frames } of models) {
    draw.fillText(`${name}: x_t, and below it the predicted clean image`, MARGIN, top);
    top += LINE;
    for (const row of ["xT", "x0"] as const) {
      shown.forEach((number, column) => {
        const pixels = frames[number][row];
        if (pixels) draw.drawImage(drawn(pixels), MARGIN + column * (CELL + MARGIN), top, CELL, CELL);
      });
      top += CELL + MARGIN;
    }
  }
  shown.forEach((number, column) => draw.fillText(caption(number), MARGIN + column * (CELL + MARGIN), top, CELL));
  lines.forEach((line, number) => draw.fillText(line, MARGIN, top + LINE * (1 + number)));
  return canvas;
}

const FONT = "13px system-ui, sans-serif";

function wrapped(text: string, width: number): string[] {
  const measure = context(document.createElement("canvas"));
  measure.font = FONT;
  const lines = [""];
  for (const word of text.split(" ")) {
    const longer = `${lines[lines.length - 1]} ${word}`.trim();
    if (measure.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

function context(canvas: HTMLCanvasElement): CanvasRenderingContext2D {
  const found = canvas.getContext("2d");
  if (!found) throw new Error("this browser cannot draw on a canvas");
  return found;
}

/** Let the browser save a canvas as PNG, with a description in it. */
export async function save(canvas: HTMLCanvasElement, name: string, description: string): Promise<void> {
  const png = await new Promise<Blob | null>((resolve) => canvas.toBlob(resolve, "image/png"));
  if (!png) throw new Error("this browser cannot write PNGs");
  const described = withText(new Uint8Array(await png.arrayBuffer()), "Description", description);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([described], { type: "image/png" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

const AFTER_HEADER = 8 + 25; // signature, and the chunk IHDR

/** Return a PNG with a text in it: the chunk iTXt (PNG specification, section 11.3.3.4). */
export function withText(png: Uint8Array, keyword: string, text: string): Uint8Array<ArrayBuffer> {
  const content = new TextEncoder().encode(`iTXt${keyword}\0\0\0\0\0${text}`);
  const chunk = new Uint8Array(content.length + 8);
  const view = new DataView(chunk.buffer);
  view.setUint32(0, content.length - 4);
  chunk.set(content, 4);
  view.setUint32(content.length + 4, crc32(content));
  const result = new Uint8Array(png.length + chunk.length);
  result.set(png.subarray(0, AFTER_HEADER));
  result.set(chunk, AFTER_HEADER);
  result.set(png.subarray(AFTER_HEADER), AFTER_HEADER + chunk.length);
  return result;
}

function crc32(bytes: Uint8Array): number {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
