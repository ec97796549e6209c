// The noise of ddpmctl (ddpmctl/diffusion/randomness.py): a stream for each image, with the values of torch.randn on a CPU.

import { blake2b } from "@noble/hashes/blake2.js";

/** Return the seed of a stream, as `derived_seed`; only its lower 32 bits reach torch's generator. */
export function derivedSeed(seed: string, key: (string | number)[]): number {
  const text = `[${[seed, ...["image", ...key].map((part) => JSON.stringify(part))].join(", ")}]`;
  const digest = blake2b(new TextEncoder().encode(text), { dkLen: 8 });
  const value = digest.reduce((sum, byte) => (sum << 8n) | BigInt(byte), 0n) >> 1n;
  return Number(value & 0xffffffffn);
}

/** The Mersenne Twister MT19937 (Matsumoto & Nishimura 1998), as in torch. */
class Twister {
  private readonly state = new Uint32Array(624);
  private next = 624;

  constructor(seed: number) {
    this.state[0] = seed;
    for (let i = 1; i < 624; i++) {
      const before = this.state[i - 1] ^ (this.state[i - 1] >>> 30);
      this.state[i] = Math.imul(before, 1812433253) + i;
    }
  }

  /** Return a random value of 32 bits. */
  draw(): number {
    if (this.next === 624) this.twist();
    let y = this.state[this.next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  }

  private twist(): void {
    const { state } = this;
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.next = 0;
  }
}

const BLOCK = 16;

/** Standard normal values of one image, drawn again and again: `size` each time, a multiple of 16. */
export class ImageNoise {
  private readonly twister: Twister;

  constructor(seed: string, key: (string | number)[], private readonly size: number) {
    this.twister = new Twister(derivedSeed(seed, key));
  }

  /** Return the next values: as torch, uniform values of 24 bits, and the method of Box & Muller (1958) in blocks of 16. */
  draw(): Float32Array {
    const values = new Float32Array(this.size);
    for (let i = 0; i < values.length; i++) values[i] = (this.twister.draw() & 0xffffff) / 2 ** 24;
    for (let block = 0; block < values.length; block += BLOCK) {
      for (let i = block; i < block + BLOCK / 2; i++) {
        const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
        const angle = 2 * Math.PI * values[i + BLOCK / 2];
        values[i] = radius * Math.cos(angle);
        values[i + BLOCK / 2] = radius * Math.sin(angle);
      }
    }
    return values;
  }
}
