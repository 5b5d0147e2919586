// The connection against sockets and a clock that the tests hold in their hands.

import { beforeEach, describe, expect, test } from "vitest";
import {
  Connection,
  isLoopback,
  LONGEST_RETRY,
  LOOPBACK_RETRY,
  REFUSED_RETRY,
  type Link,
  type Probe,
  type Socket,
} from "../src/connection";
import type { ServerMessage } from "../src/protocol";

class FakeClock {
  time = 0;
  #timers: { at: number; number: number; callback: () => void }[] = [];
  #numbers = 0;

  now = (): number => this.time;
  random = (): number => 0.5;
  setTimeout = (callback: () => void, ms: number): number => {
    this.#timers.push({ at: this.time + ms, number: ++this.#numbers, callback });
    return this.#numbers;
  };
  clearTimeout = (number: number): void => {
    this.#timers = this.#timers.filter((timer) => timer.number !== number);
  };

  /** Let time pass; what is due happens in its order. */
  async pass(ms: number): Promise<void> {
    const end = this.time + ms;
    for (;;) {
      const due = this.#timers.filter(({ at }) => at <= end).sort((a, b) => a.at - b.at)[0];
      if (due === undefined) break;
      this.time = due.at;
      this.clearTimeout(due.number);
      due.callback();
      await settle();
    }
    this.time = end;
    await settle();
  }
}

/** Let what was promised be kept. */
async function settle(): Promise<void> {
  for (let turn = 0; turn < 10; turn++) await Promise.resolve();
}

class FakeSocket implements Socket {
  binaryType = "";
  onopen: (() => void) | null = null;
  onmessage: ((event: { data: unknown }) => void) | null = null;
  onclose: ((event: { code: number; reason: string }) => void) | null = null;
  readonly sent: { type: string; [field: string]: unknown }[] = [];
  closed = false;

  send(text: string): void {
    this.sent.push(JSON.parse(text));
  }
  close(): void {
    this.closed = true;
  }
  says(message: object): void {
    this.onmessage?.({ data: JSON.stringify(message) });
  }
  opens(): void {
    this.onopen?.();
    this.says({ type: "hello", server: "s", runs: [], run: null });
  }
  async ends(code = 1006, reason = ""): Promise<void> {
    this.onclose?.({ code, reason });
    await settle();
  }
  kinds(): string[] {
    return this.sent.map(({ type }) => type);
  }
}

let clock: FakeClock;
let sockets: FakeSocket[];
let phases: Link["phase"][];
let heard: ServerMessage[];
let answer: Probe;
let probes: number;

function connect(loopback = true): Connection {
  const connection = new Connection({
    open: () => {
      sockets.push(new FakeSocket());
      return last();
    },
    probe: () => {
      probes += 1;
      return Promise.resolve(answer);
    },
    clock,
    loopback,
    greeting: () => ({ run: "r", only: false, server: "s", after: 7, keys: ["k"], samples: "index" }),
    onText: (message) => heard.push(message),
    onChart: () => undefined,
    onLink: ({ phase }) => {
      if (phases.at(-1) !== phase) phases.push(phase);
    },
  });
  connection.start();
  return connection;
}

function last(): FakeSocket {
  return sockets.at(-1) as FakeSocket;
}

beforeEach(() => {
  clock = new FakeClock();
  sockets = [];
  phases = [];
  heard = [];
  answer = "gone";
  probes = 0;
});

describe("opening", () => {
  test("greets with what the page knows, and is open when the server has answered", () => {
    const connection = connect();
    last().onopen?.();
    expect(last().sent).toEqual([{ type: "hi", protocol: 1, samples: "index", run: "r", only: false, server: "s", after: 7, keys: ["k"] }]);
    expect(connection.send({ type: "drawn" })).toBe(false);
    last().says({ type: "hello", server: "s", runs: [], run: null });
    expect(phases).toEqual(["open"]);
    expect(connection.send({ type: "drawn" })).toBe(true);
  });

  test("who has the cookie and not the key is not authorised, and asks again after a while", async () => {
    answer = "unauthorised";
    connect();
    last().onopen?.();
    await last().ends(4001, "Open the page with the address that the run printed.");
    expect(phases).toEqual(["unauthorised"]);
    expect(probes).toBe(0);
    answer = "free";
    await clock.pass(REFUSED_RETRY);
    expect(probes).toBe(1);
    last().opens();
    expect(phases).toEqual(["unauthorised", "open"]);
  });

  test("who logs out while connected is not authorised any more", async () => {
    connect();
    last().opens();
    await last().ends(4001, "The user has logged out.");
    expect(phases).toEqual(["open", "unauthorised"]);
  });

  test("a socket that never answers is given up", async () => {
    connect();
    last().onopen?.();
    await clock.pass(10_000);
    expect(sockets[0]?.closed).toBe(true);
    expect(phases).toEqual(["gone"]);
  });

  test.each<[Probe, Link["phase"]]>([
    ["unauthorised", "unauthorised"],
    ["full", "full"],
    ["gone", "gone"],
  ])("a refused handshake is explained by the status, and looked at again after a while: %s", async (said, phase) => {
    answer = said;
    connect();
    await last().ends();
    expect(phases).toEqual([phase]);
    answer = "free";
    await clock.pass(REFUSED_RETRY);
    expect(sockets.length).toBe(2);
  });

  test("where websockets do not get through, it says so and tries on, slowly", async () => {
    answer = "free";
    connect();
    for (let attempt = 0; attempt < 4; attempt++) await last().ends();
    expect(phases).toEqual(["blocked"]);
    const opened = sockets.length;
    await clock.pass(LONGEST_RETRY);
    expect(sockets.length).toBe(opened + 1);
    last().opens();
    expect(phases).toEqual(["blocked", "open"]);
  });

  test("another version of the protocol ends the attempts", async () => {
    connect();
    await last().ends(4002, "this server speaks protocol 2");
    await clock.pass(60_000);
    expect(phases).toEqual(["refused"]);
    expect(sockets.length).toBe(1);
  });
});

describe("coming back", () => {
  test("a server on this machine is found within half a second of its return", async () => {
    connect();
    last().opens();
    await clock.pass(10_000);
    await last().ends();
    expect(phases).toEqual(["open", "reconnecting", "gone"]);
    await clock.pass(30_000);
    expect(sockets.length).toBe(1); // looked for without websockets, which browsers would delay
    answer = "free";
    await clock.pass(LOOPBACK_RETRY);
    expect(sockets.length).toBe(2);
    last().opens();
    expect(phases.at(-1)).toBe("open");
  });

  test("elsewhere, the pauses grow to five seconds and a bit", async () => {
    connect(false);
    last().opens();
    await last().ends();
    const at: number[] = [];
    for (let before = probes; at.length < 12; ) {
      await clock.pass(50);
      if (probes > before) at.push(clock.time);
      before = probes;
    }
    const pauses = at.slice(1).map((time, index) => time - (at[index] ?? 0));
    expect(pauses[0]).toBeLessThan(1_000);
    expect(Math.max(...pauses)).toBeLessThanOrEqual(LONGEST_RETRY * 1.3 + 50);
    expect(pauses.at(-1)).toBeGreaterThan(LONGEST_RETRY * 0.7);
  });

  test("a page that nobody sees looks seldom, and at once when somebody does", async () => {
    const connection = connect();
    last().opens();
    connection.setVisible(false);
    await last().ends();
    await clock.pass(60_000);
    const before = probes;
    await clock.pass(10_000);
    expect(probes - before).toBeLessThan(5);
    answer = "free";
    connection.setVisible(true);
    await settle();
    expect(sockets.length).toBe(2);
  });

  test("a server that goes soon after each start is not taken for one that websockets do not reach", async () => {
    connect();
    for (let start = 0; start < 8; start++) {
      last().opens();
      answer = "gone";
      await last().ends();
      answer = "free";
      await clock.pass(LOOPBACK_RETRY);
      expect(sockets.length).toBe(start + 2);
    }
    expect(phases).not.toContain("blocked");
  });

  test("after being too slow it comes back at once, but not in a circle", async () => {
    answer = "free";
    connect();
    last().opens();
    await clock.pass(5_000);
    await last().ends(4008);
    expect(sockets.length).toBe(2);
    expect(probes).toBe(0);
    for (let round = 0; round < 10; round++) {
      last().opens();
      await last().ends(4008);
    }
    expect(sockets.length).toBeLessThan(8);
  });

  test("a protocol error in the middle of it is no reason to stay away", async () => {
    answer = "free";
    connect();
    last().opens();
    await clock.pass(5_000);
    await last().ends(4002, "there is no curve 7");
    expect(sockets.length).toBe(2);
  });
});

describe("the heartbeat", () => {
  test("measures how long an answer takes", async () => {
    const connection = connect();
    last().opens();
    await clock.pass(500);
    const ping = last().sent.find(({ type }) => type === "ping");
    clock.time += 30;
    last().says({ type: "pong", sent: ping?.sent, time: 0 });
    expect(connection.link.latency).toBe(30);
  });

  test("once a stall is over, the page knows at once and not with the next heartbeat", async () => {
    const connection = connect();
    last().opens();
    await clock.pass(500);
    await clock.pass(4_000);
    last().says({ type: "pong", sent: 500, time: 0 });
    expect(connection.link.latency).toBe(4_000);
    await clock.pass(500);
    const ping = last().sent.at(-1);
    expect(ping).toEqual({ type: "ping", sent: 5_000 });
    last().says({ type: "pong", sent: ping?.sent, time: 0 });
    expect(connection.link.latency).toBe(0);
    const pings = last().sent.length;
    await clock.pass(4_900);
    expect(last().sent.length).toBe(pings);
  });

  test("a server that has nothing to say but answers stays", async () => {
    connect();
    last().opens();
    for (let second = 0; second < 120; second++) {
      await clock.pass(1_000);
      const ping = last().sent.at(-1);
      if (ping?.type === "ping") last().says({ type: "pong", sent: ping.sent, time: 0 });
    }
    expect(phases).toEqual(["open"]);
    expect(last().kinds().filter((kind) => kind === "ping").length).toBeGreaterThan(20);
  });

  test("a server that is silent is gone after 12 seconds", async () => {
    connect();
    last().opens();
    await clock.pass(500);
    last().says({ type: "pong", sent: 500, time: 0 });
    await clock.pass(11_900);
    expect(phases).toEqual(["open"]);
    await clock.pass(200);
    expect(sockets[0]?.closed).toBe(true);
    expect(phases).toEqual(["open", "reconnecting", "gone"]);
  });

  test("anything that comes is a sign of life", async () => {
    connect();
    last().opens();
    for (let second = 0; second < 60; second++) {
      await clock.pass(1_000);
      last().says({ type: "runs", runs: [] });
    }
    expect(phases).toEqual(["open"]);
  });
});

test("what comes from a socket that was given up is not heard", async () => {
  connect();
  last().opens();
  const first = last();
  const hears = first.onmessage;
  await clock.pass(15_000);
  heard.length = 0;
  hears?.({ data: '{"type":"bye","reason":"late"}' });
  expect(heard).toEqual([]);
});

test("messages of a kind that is not known are passed over", () => {
  connect();
  last().opens();
  last().says({ type: "weather" });
  expect(heard.map(({ type }) => type)).toEqual(["hello"]);
});

test("names of this machine", () => {
  expect(["localhost", "127.0.0.1", "127.1.2.3", "[::1]", "a.localhost"].every(isLoopback)).toBe(true);
  expect(["127.0.0.1.example.org", "example.org", "10.0.0.1", "localhost.example.org"].some(isLoopback)).toBe(false);
});
