// The drawer that the sidebar is on a phone, and the theme.

import { announce } from "./dom.js";
import { local } from "./storage.js";

const byId = (id) => document.getElementById(id);
const phone = matchMedia("(max-width: 760px)");

function openMenu() {
  document.body.classList.add("menu-open");
  byId("scrim").hidden = false;
  setMenu();
  byId("close-menu").focus();
}

export function closeMenu() {
  const wasOpen = document.body.classList.contains("menu-open");
  document.body.classList.remove("menu-open");
  byId("scrim").hidden = true;
  setMenu();
  if (wasOpen) byId("open-menu").focus();
}

function setMenu() {
  const open = document.body.classList.contains("menu-open");
  byId("sidebar").inert = phone.matches && !open;
  byId("main").inert = phone.matches && open;
  byId("open-menu").ariaExpanded = String(open);
}

function switchTheme() {
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (root.dataset.theme ?? system) === "dark" ? "light" : "dark";
  if (next === system) delete root.dataset.theme;
  else root.dataset.theme = next;
  try {
    local.setItem("subspec.theme", root.dataset.theme ?? "");
  } catch {
    // Shown, but not kept.
  }
  announce(`${next} theme`);
}

export function prepareMenu() {
  setMenu();
  phone.addEventListener("change", closeMenu);
  byId("open-menu").addEventListener("click", openMenu);
  byId("close-menu").addEventListener("click", closeMenu);
  byId("scrim").addEventListener("click", closeMenu);
  byId("theme").addEventListener("click", switchTheme);
}

/** Closes an open menu. Returns whether there was one. */
export function closedMenu() {
  const isOpen = document.body.classList.contains("menu-open");
  closeMenu();
  return isOpen;
}
