// The one tooltip of the page.

const box = document.getElementById("tip");
const GAP = 8;

export const tip = {
  show(anchor, [headline, ...details]) {
    const head = document.createElement("b");
    head.textContent = headline;
    box.replaceChildren(head, ...details.map((detail) => Object.assign(document.createElement("span"), { textContent: detail })));
    box.hidden = false;
    // A token may be broken over two lines; its first part is where it is read.
    const at = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const { width, height } = box.getBoundingClientRect();
    const above = at.top - height - GAP;
    box.style.left = `${Math.max(GAP, Math.min(at.left, innerWidth - width - GAP))}px`;
    box.style.top = `${above > GAP ? above : at.bottom + GAP}px`;
  },
  hide() {
    box.hidden = true;
  },
};
