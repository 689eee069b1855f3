// Before the page is drawn: the theme that the user chose, if not the system's. No module, so that
// it runs at once.
try {
  const chosen = localStorage.getItem("subspec.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that keeps nothing shows the system's theme.
}
