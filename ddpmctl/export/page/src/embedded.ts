// What is embedded in the page, as text: JSON, and bytes compressed with gzip in base64.

import type { PageData } from "./model.ts";

const MOST_SIGNIFICANT = 3; // the byte of a little-endian float32 that holds sign and exponent

function textOf(id: string): string {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page is not complete: ${id} is missing`);
  return element.textContent;
}

export function embeddedData(): PageData {
  return JSON.parse(textOf("data")) as PageData;
}

/** Return the address of the worker's program. */
export function engineAddress(): string {
  return URL.createObjectURL(new Blob([textOf("engine")], { type: "text/javascript" }));
}

/** Return embedded bytes; their text is then removed, because it needs much memory. */
export async function embeddedBytes(id: string): Promise<Uint8Array<ArrayBuffer>> {
  const binary = atob(textOf(id).trim());
  document.getElementById(id)?.remove();
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Return float32 values whose bytes are stored by significance, the highest first; bytes that are not stored are zero. */
export function floats(planes: Uint8Array, stored: number): Uint8Array<ArrayBuffer> {
  const count = planes.length / stored;
  const bytes = new Uint8Array(4 * count);
  for (let plane = 0; plane < stored; plane++) {
    for (let i = 0; i < count; i++) bytes[4 * i + MOST_SIGNIFICANT - plane] = planes[plane * count + i];
  }
  return bytes;
}
