// A client of the live page written from docs/dashboard.md alone: follows a run to its end, sets its learning
// rate on the way, and prints what it saw as JSON.
//
//     NODE_PATH=dashboard/web/node_modules node follow.cjs 'http://127.0.0.1:8321/?token=...' 0.125
"use strict";
const WebSocket = require("ws");

const address = new URL(process.argv[2]);
const wantedLr = Number(process.argv[3]);
const socket = new WebSocket(`ws://${address.host}/ws`, "offloop.v1", {
  headers: { Authorization: `Bearer ${address.searchParams.get("token")}` },
});
const send = (message) => socket.send(JSON.stringify(message));

const seen = { hello: null, run: null, status: null, milestones: [], acks: [], bye: null, close: null };
const keys = new Map(); // id -> name
const curves = new Map(); // id -> [[step, value], ...]
let isAsked = false;

function decode(data) {
  const headerLength = data.readUInt32LE(0);
  const header = JSON.parse(data.toString("utf8", 4, 4 + headerLength));
  let offset = 4 + headerLength;
  const column = (count, size, read) =>
    Array.from({ length: count }, () => {
      offset += size;
      return read(offset - size);
    });
  const floats = (count) => column(count, 8, (at) => data.readDoubleLE(at));
  const step = floats(header.rows);
  const time = floats(header.rows);
  const epoch = floats(header.rows);
  const values = header.series.map(({ points }) => floats(points));
  const rows = header.series.map(({ dense, points }) =>
    dense ? Array.from({ length: points }, (_, i) => i) : column(points, 4, (at) => data.readUInt32LE(at)),
  );
  if (offset !== data.length) throw new Error(`${data.length - offset} bytes are left of a frame`);
  return { header, step, time, epoch, values, rows };
}

function take(frame) {
  frame.header.series.forEach((column, place) => {
    const points = frame.values[place].map((value, i) => [frame.step[frame.rows[place][i]], value]);
    const before = frame.header.kind === "delta" ? (curves.get(column.id) ?? []) : [];
    curves.set(column.id, before.concat(points));
  });
}

socket.on("open", () => send({ type: "hi", protocol: 1 }));
socket.on("message", (data, isBinary) => {
  if (isBinary) {
    take(decode(data));
    send({ type: "drawn" });
    return;
  }
  const message = JSON.parse(data.toString("utf8"));
  switch (message.type) {
    case "series":
      for (const series of message.series) keys.set(series.id, series.key);
      send({ type: "show", run: message.run, series: [...keys.keys()], points: 4000 });
      break;
    case "milestone":
      seen.milestones.push(message.event);
      break;
    case "ack":
      seen.acks.push({ state: message.state, step: message.step });
      break;
    case "status":
      seen.status = message;
      if (message.step > 0 && !isAsked) {
        isAsked = true;
        send({ type: "command", id: "one-of-a-kind", name: "set_lr", run: message.run, lr: wantedLr });
      }
      break;
    default:
      if (message.type in seen) seen[message.type] = message;
  }
});
socket.on("close", (code, reason) => {
  seen.close = { code, reason: reason.toString("utf8") };
  const named = Object.fromEntries([...curves].map(([id, points]) => [keys.get(id), points]));
  process.stdout.write(JSON.stringify({ ...seen, curves: named }));
});
