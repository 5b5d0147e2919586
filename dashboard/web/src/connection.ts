// The websocket to the server: opened, watched over, and opened again. No DOM; socket, probe and clock are given.
//
//     connecting ──hello──> open ──lost──> reconnecting ──no answer──> gone
//                            ^                  │  ^                     │
//                            └──────hello───────┘  └──────answers────────┘
//
// Browsers report every refused handshake as close code 1006 and delay websockets more and more, up to seconds,
// once a few of them have failed (Chromium does). So after a failure the page asks `api/status` by fetch, which
// tells a missing token, a full server and a missing one apart and is not delayed, and opens a websocket only
// when the server has answered.

import {
  CLOSE_DAMAGED,
  CLOSE_PROTOCOL,
  CLOSE_SLOW,
  CLOSE_UNAUTHORISED,
  HEARTBEAT,
  PROTOCOL_VERSION,
  SUBPROTOCOL,
  decodeText,
  type Hi,
  type ServerMessage,
  type ViewerMessage,
} from "./protocol";

/** The part of WebSocket that is used. */
export interface Socket {
  binaryType: string;
  onopen: (() => void) | null;
  onmessage: ((event: { data: unknown }) => void) | null;
  onclose: ((event: { code: number; reason: string }) => void) | null;
  send(text: string): void;
  close(code?: number, reason?: string): void;
}

/** What `api/status` says: it answers, lets nobody more in, does not know us, or is not there. */
export type Probe = "free" | "full" | "unauthorised" | "gone";

export type Phase =
  /** The first connection is on its way. */
  | "connecting"
  /** The server has said hello. */
  | "open"
  /** It was open and is not now. */
  | "reconnecting"
  /** Nobody answers. */
  | "gone"
  | "unauthorised"
  | "full"
  /** The server answers, websockets to it do not: something in between does not let them through. */
  | "blocked"
  /** The server speaks another protocol: no further attempts. */
  | "refused"
  /** The file that holds page and runs is not whole. */
  | "damaged";

export interface Link {
  phase: Phase;
  /** When this phase began, milliseconds of the clock. */
  since: number;
  /** Why, where the server said. */
  reason: string;
  /** When the server was last heard; null for never. */
  heard: number | null;
  /** Milliseconds from ping to pong; null until measured. */
  latency: number | null;
  /** When a ping went out that has no answer yet. */
  waiting: number | null;
}

export interface Clock {
  /** Milliseconds, never going backwards. */
  now(): number;
  random(): number;
  setTimeout(callback: () => void, ms: number): number;
  clearTimeout(timer: number): void;
}

export interface ConnectionOptions {
  open: () => Socket;
  probe: () => Promise<Probe>;
  clock: Clock;
  /** The server is on this machine: looking for it often costs nobody anything. */
  loopback: boolean;
  /** What the page knows already, asked for each time a socket opens. */
  greeting: () => Omit<Hi, "type" | "protocol">;
  onText: (message: ServerMessage) => void;
  onChart: (data: ArrayBuffer) => void;
  onLink: (link: Link) => void;
}

/** Milliseconds between two looks for a server on this machine: a run that starts is seen within half a second. */
export const LOOPBACK_RETRY = 400;
/** For others, and while nobody looks: from the first to the longest, growing by GROWTH, give or take JITTER. */
export const FIRST_RETRY = 400;
export const LONGEST_RETRY = 5_000;
const GROWTH = 1.7;
const JITTER = 0.3;
/** Between two looks for a free place or a valid cookie. */
export const REFUSED_RETRY = 5_000;
const PING_EVERY = HEARTBEAT * 1_000;
const FIRST_PING = 500;
/** An answer that took longer than this says what was, not what is: the next ping follows after FIRST_PING. */
const LATE = 1_000;
/** After a ping without any answer for this long, the server is gone: 12 s after it was last asked. */
const PONG_WITHIN = 7_000;
/** A connection that lasts this long is a good one. */
const STABLE_AFTER = 3_000;
/** Sockets that are opened one after the other to a server that answers the question for its status. */
const SOCKETS_AT_ONCE = 4;
/** A socket that neither opens nor greets is given up. */
const GREET_WITHIN = 8_000;

export class Connection {
  readonly #options: ConnectionOptions;
  readonly #clock: Clock;
  #socket: Socket | null = null;
  #link: Link;
  #retry: number | null = null;
  #heartbeat: number | null = null;
  #deadline: number | null = null;
  /** Looks for a server in a row that found none: the pauses between them grow. */
  #looks = 0;
  /** Sockets opened in a row that did not last. */
  #sockets = 0;
  #probing = false;
  #visible = true;
  #closed = false;

  constructor(options: ConnectionOptions) {
    this.#options = options;
    this.#clock = options.clock;
    this.#link = {
      phase: "connecting", since: this.#clock.now(), reason: "", heard: null, latency: null, waiting: null,
    };
  }

  get link(): Link {
    return this.#link;
  }

  /** Open the first socket; call it once. */
  start(): void {
    this.#connect();
  }

  /** Send a message; false if there is nobody to send it to. */
  send(message: ViewerMessage): boolean {
    if (this.#socket === null || this.#link.phase !== "open") return false;
    this.#socket.send(JSON.stringify(message));
    return true;
  }

  /** Tell whether anybody looks; coming back looks for the server at once. */
  setVisible(visible: boolean): void {
    this.#visible = visible;
    if (this.#link.phase === "open") {
      this.send({ type: "visible", visible });
    }
    if (visible) this.wake();
  }

  /** Something suggests that the network is back, or the machine: see at once instead of at the next turn. */
  wake(): void {
    if (this.#closed || this.#link.phase === "refused" || this.#link.phase === "damaged") return;
    if (this.#link.phase === "open") {
      this.#ping();
    } else if (this.#socket === null && !this.#probing) {
      this.#looks = this.#sockets = 0;
      this.#clearRetry();
      void this.#look();
    }
  }

  close(): void {
    this.#closed = true;
    this.#clearRetry();
    this.#drop(1000);
  }

  #connect(): void {
    const socket = this.#options.open();
    this.#socket = socket;
    this.#sockets += 1;
    socket.binaryType = "arraybuffer";
    this.#deadline = this.#clock.setTimeout(() => this.#lose(socket, "no answer"), GREET_WITHIN);
    socket.onopen = () => {
      const hi: Hi = { type: "hi", protocol: PROTOCOL_VERSION, ...this.#options.greeting() };
      socket.send(JSON.stringify(hi));
    };
    socket.onmessage = ({ data }) => {
      if (socket === this.#socket) this.#receive(data);
    };
    socket.onclose = ({ code, reason }) => {
      if (socket === this.#socket) this.#ended(code, reason);
    };
  }

  #receive(data: unknown): void {
    this.#link.heard = this.#clock.now();
    this.#link.waiting = null;
    if (data instanceof ArrayBuffer) {
      this.#options.onChart(data);
      return;
    }
    const message = decodeText(String(data));
    if (message === null) return; // of a newer server; what it means is not ours to know
    if (message.type === "hello") this.#opened();
    if (message.type === "pong") {
      const latency = Math.max(0, this.#clock.now() - message.sent);
      if (latency > LATE) this.#pingIn(FIRST_PING);
      this.#change({ latency });
    }
    this.#options.onText(message);
  }

  #opened(): void {
    this.#clearDeadline();
    this.#change({ phase: "open", since: this.#clock.now(), reason: "" });
    if (!this.#visible) this.send({ type: "visible", visible: false });
    // Not at once: the first messages keep the page busy, and that is no latency.
    this.#pingIn(FIRST_PING);
  }

  #pingIn(ms: number): void {
    this.#clearHeartbeat();
    this.#heartbeat = this.#clock.setTimeout(() => this.#ping(), ms);
  }

  #ping(): void {
    this.#pingIn(PING_EVERY);
    const socket = this.#socket;
    if (socket === null || this.#link.waiting !== null) return;
    const asked = this.#clock.now();
    this.#link.waiting = asked;
    this.send({ type: "ping", sent: asked });
    // Timers of a hidden tab come late, by up to a minute, messages do not: so silence counts from a ping that
    // went out, and not from when something was last heard.
    this.#clearDeadline();
    this.#deadline = this.#clock.setTimeout(() => {
      if (this.#link.waiting === asked) this.#lose(socket, "no answer");
    }, PONG_WITHIN);
  }

  /** Give a silent socket up. It may take its time to close, and nobody waits for it. */
  #lose(socket: Socket, reason: string): void {
    if (socket !== this.#socket) return;
    if (this.#wasStable()) this.#sockets = 0;
    this.#drop(undefined);
    this.#lost(reason);
  }

  /** Whether the connection has held; one that breaks at once must not be opened in a tight circle. */
  #wasStable(): boolean {
    return this.#link.phase === "open" && this.#clock.now() - this.#link.since >= STABLE_AFTER;
  }

  #ended(code: number, reason: string): void {
    const wasOpen = this.#link.phase === "open";
    if (this.#wasStable()) this.#sockets = 0;
    this.#drop(null);
    if (this.#closed) return;
    if (code === CLOSE_DAMAGED) {
      this.#change({ phase: "damaged", since: this.#clock.now(), reason });
    } else if (code === CLOSE_PROTOCOL && !wasOpen) {
      this.#change({ phase: "refused", since: this.#clock.now(), reason });
    } else if (code === CLOSE_UNAUTHORISED) {
      // The cookie without the key, or the user has logged out: as when the status says so.
      this.#sockets = 0;
      this.#change({ phase: "unauthorised", since: this.#clock.now(), reason });
      this.#again(REFUSED_RETRY);
    } else if (code === CLOSE_SLOW && wasOpen && this.#wasStable()) {
      this.#change({ phase: "reconnecting", since: this.#clock.now(), reason });
      this.#connect();
    } else {
      this.#lost(reason);
    }
  }

  #lost(reason: string): void {
    if (this.#link.phase === "open") {
      this.#change({ phase: "reconnecting", since: this.#clock.now(), reason });
    }
    void this.#look();
  }

  /** Ask who is there, and connect if somebody is. */
  async #look(): Promise<void> {
    if (this.#probing || this.#closed) return;
    this.#probing = true;
    const answer = await this.#options.probe();
    this.#probing = false;
    if (this.#closed || this.#socket !== null) return;
    if (answer === "free") {
      this.#looks = 0;
      const often = this.#sockets >= SOCKETS_AT_ONCE;
      if (often && this.#link.phase !== "blocked") this.#change({ phase: "blocked", since: this.#clock.now() });
      if (often) this.#again(LONGEST_RETRY, () => this.#connect());
      else this.#connect();
      return;
    }
    this.#looks += 1;
    this.#sockets = 0;
    if (answer !== this.#link.phase) this.#change({ phase: answer, since: this.#clock.now() });
    this.#again(answer === "gone" ? this.#pause() : REFUSED_RETRY);
  }

  #pause(): number {
    if (this.#options.loopback && this.#visible) return LOOPBACK_RETRY;
    const grown = Math.min(FIRST_RETRY * GROWTH ** (this.#looks - 1), LONGEST_RETRY);
    return grown * (1 - JITTER + 2 * JITTER * this.#clock.random());
  }

  #again(ms: number, next: () => void = () => void this.#look()): void {
    this.#clearRetry();
    this.#retry = this.#clock.setTimeout(() => {
      this.#retry = null;
      next();
    }, ms);
  }

  #change(patch: Partial<Link>): void {
    this.#link = { ...this.#link, ...patch };
    this.#options.onLink(this.#link);
  }

  /** Let go of the socket; `code` closes it, null says that it is closed already. */
  #drop(code: number | null | undefined): void {
    const socket = this.#socket;
    this.#socket = null;
    this.#clearDeadline();
    this.#clearHeartbeat();
    this.#link.waiting = null;
    if (socket === null) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    if (code !== null) socket.close(code);
  }

  #clearHeartbeat(): void {
    if (this.#heartbeat !== null) this.#clock.clearTimeout(this.#heartbeat);
    this.#heartbeat = null;
  }

  #clearRetry(): void {
    if (this.#retry !== null) this.#clock.clearTimeout(this.#retry);
    this.#retry = null;
  }

  #clearDeadline(): void {
    if (this.#deadline !== null) this.#clock.clearTimeout(this.#deadline);
    this.#deadline = null;
  }
}

/** Whether a host name means this machine; `ssh -L` and port forwarding look the same, and are as near. */
export function isLoopback(hostname: string): boolean {
  return (
    hostname === "localhost" ||
    hostname.endsWith(".localhost") ||
    hostname === "[::1]" ||
    /^127\.\d+\.\d+\.\d+$/.test(hostname)
  );
}

/** Ask `api/status` beside the page. */
export async function probeStatus(base: string, keys: string[]): Promise<Probe> {
  try {
    const response = await fetch(new URL("api/status", base), {
      cache: "no-store",
      headers: { "Offloop-Keys": keys.join(",") },
      signal: AbortSignal.timeout(5_000),
    });
    if (response.status === 401 || response.status === 403) return "unauthorised";
    if (!response.ok) return "gone"; // a proxy in between, whose server is not there
    const status = (await response.json()) as { full?: boolean };
    return status.full === true ? "full" : "free";
  } catch {
    return "gone";
  }
}

/** A websocket beside the page. */
export function openSocket(base: string): Socket {
  const address = new URL("ws", base);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  address.search = address.hash = "";
  return new WebSocket(address, SUBPROTOCOL) as Socket;
}
