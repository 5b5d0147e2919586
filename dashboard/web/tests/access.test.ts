import { describe, expect, test } from "vitest";
import { Access } from "../src/access";
import type { PageStorage } from "../src/storage";

const KEYS = [..."0123456789ab"].map((digit) => digit.repeat(32));
const [A, B] = KEYS as [string, string];

function memory(): PageStorage {
  const items = new Map<string, string>();
  return { getItem: (key) => items.get(key) ?? null, setItem: (key, value) => void items.set(key, value) };
}

/** A browser that keeps nothing. */
const NOTHING: PageStorage = { getItem: () => null, setItem: () => undefined };

describe("the key of the page", () => {
  test("leaves the address, and the view stays in it", () => {
    const access = new Access(memory());
    expect(access.take("")).toBe("");
    expect(access.take("#v=1&x=epoch")).toBe("#v=1&x=epoch");
    expect(access.take(`#key=${A}`)).toBe("");
    expect(access.take(`#key=${B}&v=1&x=epoch`)).toBe("#v=1&x=epoch");
    expect(access.keys()).toEqual([B, A]);
  });

  test("is there at the next visit, and in other tabs", () => {
    const storage = memory();
    const other = new Access(storage);
    new Access(storage).take(`#key=${A}`);
    expect(other.keys()).toEqual([A]);
  });

  test("counts for this visit where the browser keeps nothing", () => {
    const access = new Access(NOTHING);
    access.take(`#key=${A}`);
    expect(access.keys()).toEqual([A]);
    expect(new Access(NOTHING).keys()).toEqual([]);
  });

  test("is one of the last eight", () => {
    const access = new Access(memory());
    for (const key of KEYS) access.take(`#key=${key}`);
    access.take(`#key=${KEYS[9]}`);
    expect(access.keys()).toEqual([9, 11, 10, 8, 7, 6, 5, 4].map((place) => KEYS[place]));
  });

  test("is nothing else", () => {
    const storage = memory();
    const access = new Access(storage);
    expect(access.take("#key=<script>&key=")).toBe("");
    storage.setItem("offloop.keys", "junk,,1");
    expect(access.keys()).toEqual([]);
  });
});
