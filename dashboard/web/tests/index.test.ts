// The page's security policy allows scripts and styles from files of the page's own server only, and the page
// must work below any path: index.html has to keep to both.

import { readFileSync } from "node:fs";
import { expect, test } from "vitest";

const html = readFileSync(new URL("../src/index.html", import.meta.url), "utf8");

test("script and style are files whose address carries the page's hash, relative to the page", () => {
  expect(html).toMatch(/<script type="module" src="static\/\{\{page_hash\}\}\/page\.js"><\/script>/);
  expect(html).toMatch(/<link rel="stylesheet" href="static\/\{\{page_hash\}\}\/page\.css">/);
});

test("nothing is inline that the policy forbids", () => {
  expect(html).not.toMatch(/<script(?![^>]*\ssrc=)/i);
  expect(html).not.toMatch(/<style/i);
  expect(html).not.toMatch(/\s(style|on[a-z]+)=/i);
});

test("no address leaves the page's own folder", () => {
  const addresses = [...html.matchAll(/\s(?:src|href)="([^"]*)"/g)].map(([, address]) => address);
  expect(addresses.length).toBeGreaterThan(1);
  expect(addresses.filter((address) => !address?.startsWith("static/{{page_hash}}/"))).toEqual([]);
});
