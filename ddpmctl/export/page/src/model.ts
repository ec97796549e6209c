// What ddpmctl/export/page_file.py writes into a page: the task, and for each model its settings and its sampler as tables of numbers.

/** One step of a sampler; see `Step` in ddpmctl/export/plan.py. */
export interface Step {
  time: number;
  /** x0 = p x + q output + r */
  x0: [p: number, q: number, r: number];
  /** next = a x + b x0 + c x0 of the step before + d noise + e */
  next: [a: number, b: number, c: number, d: number, e: number];
  noise: boolean;
}

export interface Plan {
  steps: Step[];
  /** After so many steps, at `choice_time`, t / T, an image is kept or not. */
  choice: number;
  choice_time: number;
  /** A trial for which x0 of an earlier one is noised again skips so many steps. At 0, all start from new noise. */
  retry: number;
  retry_levels: [signal: number, noise: number];
  /** The log SNR of each frame, the noise first, limited to where objects appear in it. */
  visibility: number[];
}

export interface Model {
  name: string;
  /** What is known of it, as heading and text. */
  about: [string, string][];
  /** By the number of steps. */
  plans: Record<string, Plan>;
  steps: number;
  guidance: number;
  guidance_from: number;
  guidance_to: number;
  particles: number;
  /** The probability of the right objects with which a particle is kept at once; at 1, all are tried. */
  accept: number;
  /** Trials from one noise. */
  tries: number;
  /** Whether it has a second output: the log-probability that x_t shows the requested objects and nothing else. */
  recognises: boolean;
}

export interface PageData {
  version: string;
  labels: string[];
  columns: number;
  size: number;
  /** Colour and shape, with their words, where every label is one of each; else empty. */
  aspects: { name: string; words: string[] }[];
  /** The labels that are chosen at first. */
  first: string[];
  models: Model[];
}

/** What an image is made of; the same request gives the same image. */
export interface Request {
  labels: string[];
  /** A whole number, in decimal: it may be larger than a JavaScript number holds. */
  seed: string;
  steps: number;
  guidance: number;
  guidanceFrom: number;
  guidanceTo: number;
  particles: number;
}

/** One frame: images as RGBA bytes. There is no x0 for pure noise. */
export interface Frame {
  xT: Uint8ClampedArray<ArrayBuffer>;
  x0: Uint8ClampedArray<ArrayBuffer> | null;
}

export type ToEngine =
  | { kind: "load"; runtime: ArrayBuffer; data: PageData; networks: { graph: Uint8Array; weights: Uint8Array }[] }
  | { kind: "sample"; id: number; request: Request }
  | { kind: "stop" };

export type FromEngine =
  | { kind: "ready" }
  | { kind: "frame"; id: number; model: number; particle: number; index: number; frame: Frame }
  | { kind: "chosen"; id: number; model: number; particle: number }
  | { kind: "done"; id: number; seconds: number }
  | { kind: "failed"; id: number | null; reason: string };
