// The page: controls, the images of each model while they are denoised, and files to save.

import { labelChoice } from "./choice.ts";
import { embeddedBytes, embeddedData, engineAddress, floats } from "./embedded.ts";
import { drawn, save, sheet } from "./files.ts";
import type { Frame, FromEngine, Model, PageData, Request, ToEngine } from "./model.ts";

const PLAY_SECONDS = 4; // from the first frame to the last, when they are played

function part<T extends HTMLElement>(id: string): T {
  const element = document.getElementById(id);
  if (!element) throw new Error(`the page is not complete: ${id} is missing`);
  return element as T;
}

/** The two images of one model, and all frames of the present request. */
class View {
  frames: Frame[] = [];
  private readonly trials = new Map<number, Frame[]>();
  private readonly canvases: Record<keyof Frame, HTMLCanvasElement>;

  constructor(readonly model: Model, size: number, place: HTMLElement, titled: boolean) {
    const section = document.createElement("section");
    section.className = "view";
    if (titled) section.append(element("h2", model.name));
    const pair = element("div");
    pair.className = "pair";
    this.canvases = { xT: canvas(size), x0: canvas(size) };
    const captions = { xT: "x_t, the noisy image", x0: "x0_hat, the predicted clean image" };
    for (const name of ["xT", "x0"] as const) {
      const figure = element("figure");
      this.canvases[name].setAttribute("role", "img");
      figure.append(this.canvases[name], element("figcaption", captions[name]));
      pair.append(figure);
    }
    section.append(pair);
    place.append(section);
  }

  clear(): void {
    this.frames = [];
    this.trials.clear();
  }

  /** Take a frame; those of a noise that is being tried are shown until another one is tried. */
  add(particle: number, index: number, frame: Frame): void {
    const { tries } = this.model;
    // One that is noised again starts at a later frame; those before are of the trial from new noise.
    const frames = this.trials.get(particle) ?? (this.trials.get(particle - (particle % tries)) ?? []).slice(0, index);
    frames[index] = frame;
    this.trials.set(particle, frames);
    this.frames = frames;
  }

  choose(particle: number): void {
    this.frames = this.trials.get(particle) ?? [];
  }

  show(index: number, what: string): void {
    const frame = this.frames[Math.min(index, this.frames.length - 1)];
    for (const name of ["xT", "x0"] as const) {
      const target = this.canvases[name];
      const draw = target.getContext("2d");
      draw?.clearRect(0, 0, target.width, target.height);
      const pixels = frame?.[name];
      if (pixels) draw?.drawImage(drawn(pixels), 0, 0);
      target.setAttribute("aria-label", `${name === "xT" ? "x_t" : "x0_hat"} of ${this.model.name}, ${what}`);
    }
  }
}

class Page {
  private readonly data: PageData;
  private readonly views: View[];
  private readonly engine: Worker;
  private labels: string[] = [];
  private running: Request | null = null;
  private shown: Request | null = null;
  private id = 0;
  private loaded = false;
  private playing = 0;

  constructor() {
    this.data = embeddedData();
    const { models, size } = this.data;
    this.views = models.map((model) => new View(model, size, part("views"), models.length > 1));
    this.engine = new Worker(engineAddress());
    this.engine.onmessage = (event: MessageEvent<FromEngine>) => this.receive(event.data);
    this.engine.onerror = (event) => this.fail(event.message || "the program that runs the network could not be started");
    this.fillControls();
    this.connect();
    void this.load().catch((error: unknown) => this.fail(String(error)));
  }

  private async load(): Promise<void> {
    const networks = [];
    for (const number of this.data.models.keys()) {
      const stored = Number(part(`weights-${number}`).dataset.bytes);
      networks.push({ graph: await embeddedBytes(`graph-${number}`), weights: floats(await embeddedBytes(`weights-${number}`), stored) });
    }
    const runtime = (await embeddedBytes("runtime")).buffer;
    this.send({ kind: "load", runtime, data: this.data, networks }, [runtime, ...networks.map((network) => network.weights.buffer)]);
  }

  private fillControls(): void {
    const { models, labels } = this.data;
    const [first] = models;
    const steps = part<HTMLSelectElement>("steps");
    for (const count of Object.keys(first.plans)) {
      if (models.every((model) => count in model.plans)) steps.add(new Option(count, count, false, Number(count) === first.steps));
    }
    const values = { guidance: first.guidance, "guidance-from": first.guidance_from, "guidance-to": first.guidance_to, particles: 1 };
    for (const [id, value] of Object.entries(values)) part<HTMLInputElement>(id).value = String(value);
    part("particles-row").hidden = !models.some((model) => model.recognises);
    part("particles-note").textContent = `The model's own number is ${first.particles}; each that is tried costs at most as much time as an image.`;
    part("objects").hidden = labels.length === 0;
    part("objects-title").textContent = this.data.aspects.length ? "Objects" : "Labels";
    if (labels.length) {
      labelChoice(part("objects"), this.data, (chosen) => {
        this.labels = chosen;
        part("chosen").textContent = chosen.length ? chosen.join(", ") : "Choose at least one.";
        this.update();
      });
    }
    for (const model of models) {
      const list = document.createElement("dl");
      for (const [name, text] of model.about) list.append(element("dt", name), element("dd", text));
      part("about").append(...(models.length > 1 ? [element("h3", model.name)] : []), list);
    }
  }

  private connect(): void {
    part("controls").addEventListener("submit", (event) => {
      event.preventDefault();
      this.start();
    });
    part("controls").addEventListener("input", () => this.update());
    part("stop").addEventListener("click", () => this.stop());
    part("new-seed").addEventListener("click", () => {
      part<HTMLInputElement>("seed").value = String(crypto.getRandomValues(new Uint16Array(1))[0]);
      this.start();
    });
    part("frame").addEventListener("input", () => this.show());
    part("play").addEventListener("click", () => this.play());
    part("save-image").addEventListener("click", () => this.saveImages());
    part("save-frames").addEventListener("click", () => this.saveFrames());
  }

  /** The request of the controls; null while they hold something that cannot be sampled. */
  private request(): Request | null {
    const form = part<HTMLFormElement>("controls");
    if (!form.checkValidity() || (this.data.labels.length && !this.labels.length)) return null;
    const number = (id: string): number => part<HTMLInputElement>(id).valueAsNumber;
    return {
      labels: this.labels,
      seed: String(BigInt(part<HTMLInputElement>("seed").value)),
      steps: Number(part<HTMLSelectElement>("steps").value),
      guidance: number("guidance"),
      guidanceFrom: number("guidance-from"),
      guidanceTo: number("guidance-to"),
      particles: number("particles"),
    };
  }

  private start(): void {
    part<HTMLFormElement>("controls").reportValidity();
    const request = this.request();
    if (!request || !this.loaded) return;
    this.id += 1;
    this.running = this.shown = request;
    this.pause();
    for (const view of this.views) view.clear();
    part("failure").hidden = true;
    this.tell("Denoising ...");
    part("command").textContent = this.views.map((view) => command(view.model, request)).join("\n");
    const slider = part<HTMLInputElement>("frame");
    slider.max = String(request.steps);
    slider.value = "0";
    this.send({ kind: "sample", id: this.id, request });
    this.update();
  }

  private stop(): void {
    this.send({ kind: "stop" });
    this.running = null;
    this.tell("Stopped.");
    this.update();
  }

  private receive(message: FromEngine): void {
    if (message.kind === "ready") {
      this.loaded = true;
      this.tell("");
      this.start();
      this.update();
      return;
    }
    if (message.kind === "failed") {
      this.fail(message.reason);
      return;
    }
    if (message.id !== this.id || !this.running) return;
    if (message.kind === "frame") {
      this.views[message.model].add(message.particle, message.index, message.frame);
      this.follow(message.index);
    } else if (message.kind === "chosen") {
      this.views[message.model].choose(message.particle);
    } else {
      this.running = null;
      this.tell(`Done in ${message.seconds.toFixed(1)} s.`);
      this.update();
    }
  }

  /** Move the slider to the newest frame. */
  private follow(index: number): void {
    part<HTMLInputElement>("frame").value = String(index);
    this.show();
  }

  private show(): void {
    const index = part<HTMLInputElement>("frame").valueAsNumber;
    const caption = this.caption(index);
    part("where").textContent = caption;
    part("frame").setAttribute("aria-valuetext", caption);
    for (const view of this.views) view.show(index, caption);
  }

  private caption(index: number): string {
    if (!this.shown) return "";
    const { steps } = this.views[0].model.plans[this.shown.steps];
    if (index === 0) return `pure noise, before ${steps.length} steps`;
    const after = index < steps.length ? steps[index].time : 0;
    return `step ${index} of ${steps.length}, t / T = ${after.toFixed(3)}`;
  }

  private play(): void {
    if (this.playing) {
      this.pause();
      return;
    }
    const slider = part<HTMLInputElement>("frame");
    const last = Number(slider.max);
    if (slider.valueAsNumber >= last) slider.value = "0";
    part("play").textContent = "Pause";
    this.playing = setInterval(() => {
      slider.value = String(slider.valueAsNumber + 1);
      this.show();
      if (slider.valueAsNumber >= last) this.pause();
    }, (1000 * PLAY_SECONDS) / last);
  }

  private pause(): void {
    clearInterval(this.playing);
    this.playing = 0;
    part("play").textContent = "Play";
  }

  private saveImages(): void {
    const { shown } = this;
    if (!shown) return;
    for (const { frames, model } of this.views) {
      const image = drawn(frames[frames.length - 1].xT);
      void save(image, fileName(model, shown, ""), describe(model, shown)).catch((error: unknown) => this.fail(String(error)));
    }
  }

  private saveFrames(): void {
    const { shown } = this;
    if (!shown) return;
    const settings = this.views.map((view) => describe(view.model, shown)).join("; ");
    const models = this.views.map(({ frames, model }) => ({ name: model.name, frames }));
    const { visibility } = this.views[0].model.plans[shown.steps];
    const canvas = sheet(models, visibility, (index) => this.caption(index), settings);
    void save(canvas, fileName(this.views[0].model, shown, "-frames"), settings).catch((error: unknown) => this.fail(String(error)));
  }

  /** Enable what can be done now. */
  private update(): void {
    const complete = !this.running && this.views.every((view) => view.frames.length > 1 && view.frames.length === (this.shown?.steps ?? 0) + 1);
    part<HTMLButtonElement>("start").disabled = !this.loaded || !this.request();
    part<HTMLButtonElement>("new-seed").disabled = !this.loaded;
    part<HTMLButtonElement>("stop").disabled = !this.running;
    for (const id of ["play", "save-image", "save-frames"]) part<HTMLButtonElement>(id).disabled = !complete;
    part<HTMLInputElement>("frame").disabled = !complete;
  }

  private tell(text: string): void {
    part("status").textContent = text;
  }

  private fail(reason: string): void {
    this.running = null;
    this.tell("");
    fail(reason);
    this.update();
  }

  private send(message: ToEngine, transfer: Transferable[] = []): void {
    this.engine.postMessage(message, transfer);
  }
}

function fail(reason: string): void {
  part("failure").textContent = `This did not work: ${reason}`;
  part("failure").hidden = false;
}

function element(tag: string, text = ""): HTMLElement {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function canvas(size: number): HTMLCanvasElement {
  const made = document.createElement("canvas");
  made.width = made.height = size;
  return made;
}

/** Return the command that makes the same image. */
function command(model: Model, request: Request): string {
  const quoted = request.labels.map((label) => (/[",]/.test(label) ? `"${label.replaceAll('"', '""')}"` : label)).join(",");
  const what = request.labels.length ? `--labels ${shell(quoted)}` : "-n 1";
  const particles = model.recognises ? ` --particles ${request.particles}` : "";
  const guided = ` --guidance ${request.guidance} --guidance-from ${request.guidanceFrom} --guidance-to ${request.guidanceTo}`;
  return `ddpmctl sample ${shell(model.name)} ${what} --seed ${request.seed} --steps ${request.steps}${guided}${particles}`;
}

function shell(text: string): string {
  return /^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function describe(model: Model, request: Request): string {
  return `${request.labels.join(", ")} | ${command(model, request)}`;
}

function fileName(model: Model, request: Request, ending: string): string {
  const words = [model.name, ...request.labels, `seed ${request.seed}`].join(" ");
  return `${words.replaceAll(/[^\p{L}\p{N}]+/gu, "-").slice(0, 100)}${ending}.png`;
}

/** Return what this browser lacks, empty if it has everything. */
function missing(): string {
  if (typeof WebAssembly !== "object") return "WebAssembly, which runs the network, is missing or switched off";
  if (typeof DecompressionStream !== "function") return "DecompressionStream, which unpacks the network, is missing";
  if (typeof Worker !== "function") return "workers, in which the network runs, are missing";
  return "";
}

const lacking = missing();
if (lacking) {
  part("status").textContent = "";
  fail(`${lacking} in this browser. A newer version of Chrome, Edge, Firefox or Safari can run this page.`);
} else {
  new Page();
}
