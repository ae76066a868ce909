// Asks before something that cannot be undone.

/** Ask; return whether the answer is yes, which is called `verb`. */
export function confirmed(title, text, what, verb) {
  const dialog = document.getElementById("confirm");
  for (const [id, said] of [
    ["title", title],
    ["text", text],
    ["what", what],
    ["yes", verb],
  ]) {
    document.getElementById(`confirm-${id}`).textContent = said;
  }
  return new Promise((resolve) => {
    let answer = false;
    const yes = (event) => {
      event.preventDefault();
      answer = true;
      dialog.close();
    };
    const no = () => dialog.close();
    const form = dialog.querySelector("form");
    const button = document.getElementById("confirm-no");
    form.addEventListener("submit", yes);
    button.addEventListener("click", no);
    dialog.addEventListener(
      "close",
      () => {
        form.removeEventListener("submit", yes);
        button.removeEventListener("click", no);
        resolve(answer);
      },
      { once: true },
    );
    dialog.showModal();
    button.focus(); // what does no harm
  });
}
