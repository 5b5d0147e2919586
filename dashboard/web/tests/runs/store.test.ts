import { expect, test } from "vitest";
import { RunStore } from "../../src/runs/store";
import { row, rows } from "../messages";

test("rows come in parts, change, and go", () => {
  const store = new RunStore();
  store.begin();
  store.apply(rows([row("a"), row("b")], { more: true, total: 3 }));
  expect([store.complete, store.total]).toEqual([false, 3]);
  store.apply(rows([row("c")], { total: 3 }));
  expect(store.complete).toBe(true);
  store.apply(rows([row("b", { step: 20 })], { removed: ["a"], total: 2 }));
  expect([...store.rows.keys()]).toEqual(["b", "c"]);
  expect(store.rows.get("b")?.step).toBe(20);
  expect(store.total).toBe(2);
});

test("after a new connection, runs stay in sight until the answer without them is whole", () => {
  const store = new RunStore();
  store.begin();
  store.apply(rows([row("a"), row("b")]));
  store.begin();
  store.apply(rows([row("c")], { more: true, total: 2 }));
  expect([...store.rows.keys()]).toEqual(["a", "b", "c"]);
  store.apply(rows([row("b")], { total: 2 }));
  expect([...store.rows.keys()].sort()).toEqual(["b", "c"]);
});

test("names of several runs are known", () => {
  const store = new RunStore();
  store.apply(rows([row("x/demo", { name: "demo" }), row("y/demo", { name: "demo" }), row("z/demo", { name: "demo" }), row("other")]));
  expect(store.shared()).toEqual(new Set(["demo"]));
});
