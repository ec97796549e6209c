// The worker: runs the networks with ONNX Runtime, and the sampler. It sends each frame as soon as it is there.

import * as ort from "onnxruntime-web/wasm";

import type { Frame, FromEngine, PageData, Plan, Request, ToEngine } from "./model.ts";
import { ImageNoise } from "./noise.ts";

const WEIGHTS = "weights"; // the name under which the graph looks for them

let data: PageData;
let networks: ort.InferenceSession[] = [];
let current = 0; // the request that is being sampled; older ones end at their next step

class Stopped extends Error {}

addEventListener("message", (event: MessageEvent<ToEngine>) => {
  const message = event.data;
  if (message.kind === "stop") {
    current = -1;
    return;
  }
  const id = message.kind === "sample" ? message.id : null;
  const task = message.kind === "load" ? load(message) : sample(message.id, message.request);
  task.catch((error: unknown) => {
    if (!(error instanceof Stopped)) send({ kind: "failed", id, reason: error instanceof Error ? error.message : String(error) });
  });
});

function send(message: FromEngine, transfer: Transferable[] = []): void {
  postMessage(message, { transfer });
}

async function load(message: Extract<ToEngine, { kind: "load" }>): Promise<void> {
  data = message.data;
  ort.env.wasm.wasmBinary = message.runtime;
  ort.env.wasm.numThreads = 1; // more need headers of a server
  ort.env.logLevel = "error";
  networks = [];
  for (const { graph, weights } of message.networks) {
    const options = { executionProviders: ["wasm"], externalData: [{ path: WEIGHTS, data: weights }] };
    networks.push(await ort.InferenceSession.create(graph, options));
  }
  send({ kind: "ready" });
}

async function sample(id: number, request: Request): Promise<void> {
  current = id;
  const start = performance.now();
  const runs = data.models.map((_, number) => sampleModel(id, number, request));
  // One step of each model in turn, so that they are seen side by side.
  while (runs.length) {
    for (const run of [...runs]) {
      if ((await run.next()).done) runs.splice(runs.indexOf(run), 1);
    }
  }
  send({ kind: "done", id, seconds: (performance.now() - start) / 1000 });
}

/** Sample with one model: with several particles, one after another until one is kept, then that one to its end; see `SamplingPipeline.choose`. */
async function* sampleModel(id: number, number: number, request: Request): AsyncGenerator<void> {
  const model = data.models[number];
  const plan = model.plans[request.steps];
  const particles = model.recognises ? request.particles : 1;
  const first = new Trajectory(number, plan, request);
  const show = (trial: Trajectory): void => {
    const frame = trial.frame();
    send({ kind: "frame", id, model: number, particle: trial.particle, index: trial.done, frame }, transferred(frame));
  };
  let chosen = first;
  if (particles > 1) {
    let highest = -Infinity;
    let tried = first;
    for (let particle = 0; particle < particles; particle++) {
      if (particle && particle % model.tries === 0) tried = new Trajectory(number, plan, request, particle);
      const trial = particle % model.tries ? tried.again(particle) : tried;
      show(trial);
      while (trial.done < plan.choice) {
        await trial.step(id);
        show(trial);
        yield;
      }
      const likelihood = await trial.logLikelihood(id, plan.choice_time);
      if (likelihood > highest) [chosen, highest] = [trial, likelihood];
      if (model.accept < 1 && highest >= Math.log(model.accept)) break;
    }
    chosen.restart();
  } else {
    show(chosen);
  }
  send({ kind: "chosen", id, model: number, particle: chosen.particle });
  while (chosen.done < plan.steps.length) {
    await chosen.step(id);
    show(chosen);
    yield;
  }
}

/** One image from noise to its end. */
class Trajectory {
  done = 0;
  private readonly labels: Float32Array;
  private noise: ImageNoise;
  private x: Float32Array;
  private x0: Float32Array | null = null;
  private remembers = false; // whether x0 is that of the step before, which some samplers use

  constructor(private readonly number: number, private readonly plan: Plan, private readonly request: Request, readonly particle = 0) {
    this.labels = new Float32Array(data.columns);
    for (const label of request.labels) this.labels[data.labels.indexOf(label)] = 1;
    this.noise = this.noiseFor(...(particle ? ["particle", particle] : []));
    this.x = this.noise.draw();
  }

  private noiseFor(...purpose: (string | number)[]): ImageNoise {
    return new ImageNoise(this.request.seed, ["sample", 0, 0, ...purpose], 3 * data.size ** 2);
  }

  /** Return a further particle: x0 of this one, noised again, or new noise. */
  again(particle: number): Trajectory {
    const { x0, plan } = this;
    const next = new Trajectory(this.number, plan, this.request, particle);
    if (plan.retry && x0) {
      const [signal, noise] = plan.retry_levels;
      next.x = next.x.map((value, i) => signal * x0[i] + noise * value);
      [next.x0, next.done] = [x0, plan.retry];
    }
    return next;
  }

  /** Go on with new noise, and as if no step had been done before. */
  restart(): void {
    this.noise = this.noiseFor("rest");
    this.remembers = false;
  }

  async step(id: number): Promise<void> {
    const { time, x0: [p, q, r], next: [a, b, c, d, e], noise: noisy } = this.plan.steps[this.done];
    const { request, x } = this;
    const w = request.guidanceFrom <= time && time <= request.guidanceTo ? request.guidance : 0;
    const output = await this.call(id, time, w);
    const drawn = noisy ? this.noise.draw() : null;
    const x0 = x.map((value, i) => p * value + q * output[i] + r);
    const before = this.remembers && this.x0 ? this.x0 : x0; // a first step is one after which x0 has not changed
    const next = x.map((value, i) => a * value + b * x0[i] + c * before[i] + (drawn ? d * drawn[i] : 0) + e);
    if (!next.every(Number.isFinite)) throw new Error("the image is not finite");
    [this.x0, this.x, this.remembers] = [x0, next, true];
    this.done += 1;
  }

  /** Return the network's output, with guidance of weight w: (1 + w) with labels - w without (Ho & Salimans 2022, eq. 6). */
  private async call(id: number, time: number, w: number): Promise<Float32Array> {
    const { x, labels } = this;
    if (!w) return (await this.run(id, x, labels, time, 1))[0];
    const [both] = await this.run(id, joined(x, x), joined(labels, new Float32Array(labels.length)), time, 2);
    return x.map((_, i) => (1 + w) * both[i] - w * both[i + x.length]);
  }

  /** Return how likely the network finds it that the image shows what was requested, and nothing else. */
  async logLikelihood(id: number, time: number): Promise<number> {
    return (await this.run(id, this.x, this.labels, time, 1))[1][0];
  }

  private async run(id: number, x: Float32Array, labels: Float32Array, time: number, batch: number): Promise<Float32Array[]> {
    await messages();
    if (current !== id) throw new Stopped();
    const { size, columns } = data;
    const session = networks[this.number];
    const inputs = {
      x_t: new ort.Tensor("float32", x, [batch, 3, size, size]),
      labels: new ort.Tensor("float32", labels, [batch, columns]),
      time: new ort.Tensor("float32", new Float32Array(batch).fill(time), [batch]),
    };
    const outputs = await session.run(inputs);
    return session.outputNames.map((name) => outputs[name].data as Float32Array);
  }

  frame(): Frame {
    return { xT: pixels(this.x), x0: this.x0 && pixels(this.x0) };
  }
}

/** Let messages arrive, such as "stop"; what awaits only the network does not. */
function messages(): Promise<void> {
  return new Promise((resolve) => {
    const channel = new MessageChannel();
    channel.port1.onmessage = () => {
      channel.port1.close();
      resolve();
    };
    channel.port2.postMessage(null);
  });
}

function joined(first: Float32Array, second: Float32Array): Float32Array {
  const both = new Float32Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

/** Return an image (3, H, W) of values in [-1, 1] as RGBA bytes. */
function pixels(image: Float32Array): Uint8ClampedArray<ArrayBuffer> {
  const plane = image.length / 3;
  const rgba = new Uint8ClampedArray(4 * plane);
  for (let i = 0; i < plane; i++) {
    for (let channel = 0; channel < 3; channel++) rgba[4 * i + channel] = (image[channel * plane + i] + 1) * 127.5;
    rgba[4 * i + 3] = 255;
  }
  return rgba;
}

function transferred(frame: Frame): Transferable[] {
  return [frame.xT.buffer, ...(frame.x0 ? [frame.x0.buffer] : [])];
}
