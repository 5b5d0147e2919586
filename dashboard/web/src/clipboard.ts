// Text on the clipboard, where the browser lets the page: over https and on localhost.

export const CANNOT_COPY = "The browser does not let this page copy (it does over https and on localhost).";

/** Put a text on the clipboard; returns whether the browser let the page. */
export async function copyText(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return false;
  }
}
