import { expect, test } from "vitest";

import { SvgInk } from "../../src/charts/svg";

function ink(): SvgInk {
  return new SvgInk(100, 50, (text) => 6 * text.length);
}

test("texts cannot be markup, and what XML has no characters for is replaced", () => {
  const made = ink();
  made.font = '12px "A & B"';
  made.fillText('<script>"&\u0000\ud800</script>', 1, 2);
  const svg = made.toString();
  expect(svg).toContain("&lt;script&gt;&quot;&amp;\ufffd\ufffd&lt;/script&gt;");
  expect(svg).toContain("font:12px &quot;A &amp; B&quot;");
  expect(svg).not.toContain("<script");
});

test("a path is drawn as on a canvas, with its look and its place", () => {
  const made = ink();
  made.save();
  made.beginPath();
  made.rect(0, 0, 10, 10);
  made.clip();
  made.strokeStyle = "#123456";
  made.globalAlpha = 0.25;
  made.lineWidth = 2;
  made.setLineDash([7, 3]);
  made.beginPath();
  made.moveTo(1.005, 2);
  made.lineTo(3, 4);
  made.stroke();
  made.restore();
  made.beginPath();
  made.arc(5, 5, 2);
  made.fill();
  const svg = made.toString();
  expect(svg).toContain('<clipPath id="clip1"><path d="M0 0h10v10h-10z"/></clipPath>');
  expect(svg).toMatch(/d="M1 2L3 4" fill="none" stroke="#123456" stroke-width="2".*stroke-dasharray="7 3" opacity="0.25" clip-path="url\(#clip1\)"/);
  // What was saved is back: no clip, no transparency.
  expect(svg).toMatch(/<path d="M3 5a2 2 0 1 0 4 0a2 2 0 1 0 -4 0z" fill="#000"\/>/);
});
