/** Buttons that copy what an element shows. */

/** Copies an element's text. Without a clipboard (plain http from another machine) it is selected instead. */
export async function copy(element, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(element.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(element);
    button.textContent = "Selected";
  }
  button.disabled = true; // else a second press would take "Copied" for the label
  setTimeout(() => {
    button.textContent = label;
    button.disabled = false;
  }, 1500);
}

/** A button that copies the element. `what`: for those who do not see which one it stands at. */
export function copyButton(element, what) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.title = `Copy ${what}`;
  button.addEventListener("click", () => copy(element, button));
  return button;
}
