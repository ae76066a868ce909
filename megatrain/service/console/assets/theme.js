// Light or dark: as the system is, or as somebody has chosen.

const NAME = "megatrain.theme";
const NEXT = { system: "light", light: "dark", dark: "system" };

/** Let a button go through the themes. */
export function themed(button) {
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = { system: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", `Theme: ${theme}. Change to ${NEXT[theme]}`);
  };
  let theme = localStorage.getItem(NAME);
  if (!(theme in NEXT)) theme = "system";
  show(theme);
  button.addEventListener("click", () => {
    theme = NEXT[theme];
    localStorage.setItem(NAME, theme);
    show(theme);
  });
}
