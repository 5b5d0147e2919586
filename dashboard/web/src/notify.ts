// Notifications of the system, for who asked for them: the run has ended, an alert.

import { storage } from "./storage";

const STORAGE_KEY = "offloop.notify";

export class Notifier {
  #on = storage.getItem(STORAGE_KEY) === "on" && permission() === "granted";

  get on(): boolean {
    return this.#on;
  }

  /** Switch on or off; on asks the browser's user. Returns what has come of it, in words. */
  async set(on: boolean): Promise<string> {
    const granted = on && permission() !== "none" ? await Notification.requestPermission() : permission();
    this.#on = on && granted === "granted";
    storage.setItem(STORAGE_KEY, this.#on ? "on" : "off");
    if (!on) return "Notifications are off.";
    if (this.#on) return "You will be notified at the end and at alerts.";
    return granted === "none"
      ? "This browser has no notifications here (it has them over https and on localhost)."
      : "The browser does not allow this page notifications: change that in its settings.";
  }

  notify(title: string, text: string): void {
    if (!this.#on) return;
    try {
      const notification = new Notification(title, { body: text, tag: title });
      notification.onclick = () => {
        window.focus();
        notification.close();
      };
    } catch {
      // Phones have them from a service worker only; the page itself still shows everything.
    }
  }
}

function permission(): NotificationPermission | "none" {
  return "Notification" in window ? Notification.permission : "none";
}
