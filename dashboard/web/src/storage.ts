// What the page remembers between visits. A browser may keep storage from a page, or have none left: then what is
// chosen counts for this visit.

export interface PageStorage {
  getItem(key: string): string | null;
  setItem(key: string, value: string): void;
}

export const storage: PageStorage = {
  getItem: (key) => {
    try {
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  },
  setItem: (key, value) => {
    try {
      localStorage.setItem(key, value);
    } catch {
      // Full or forbidden
    }
  },
};
