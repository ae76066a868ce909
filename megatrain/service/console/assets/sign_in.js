// Asks for an API key; it is kept for this tab alone.

import { key } from "./api.js";

/** Ask until there is a key; `problem` says what was wrong with the one before. */
export function askForKey(dialog, problem) {
  const form = dialog.querySelector("form");
  const input = dialog.querySelector("input");
  dialog.querySelector(".error").textContent = problem;
  return new Promise((resolve) => {
    const stay = (event) => event.preventDefault(); // without a key there is nothing to see
    const take = (event) => {
      event.preventDefault();
      const given = input.value.trim();
      if (!given) return;
      key.set(given);
      input.value = "";
      form.removeEventListener("submit", take);
      dialog.removeEventListener("cancel", stay);
      dialog.close();
      resolve();
    };
    form.addEventListener("submit", take);
    dialog.addEventListener("cancel", stay);
    dialog.showModal();
    input.focus();
  });
}
