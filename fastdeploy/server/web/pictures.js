// Pictures of a message: from files to data URLs, and how they are shown.

import { element } from "./markdown.js";

const MOST_PIXELS = 4_842_768; // the model gets no more of one
const MOST_BYTES = 3 * 2 ** 20; // every request of the conversation sends it again

// A file as a data URL, made smaller where that loses the model nothing. Raises Error for a file
// that is no picture.
export async function dataUrl(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`${file.name || "What was given"} is no picture that this browser can read.`);
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)));
  if (scale === 1 && file.size <= MOST_BYTES) return read(file);
  const canvas = element("canvas");
  canvas.width = Math.max(1, Math.floor(width * scale));
  canvas.height = Math.max(1, Math.floor(height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // JPEG has no transparency
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

// What the API takes as the content of a message.
export function contentOf({ content, pictures }) {
  if (!pictures?.length) return content ?? "";
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return content ? [...parts, { type: "text", text: content }] : parts;
}

export const thumbnail = (url, number) => element("img", { src: url, alt: `Picture ${number + 1}` });

// Pictures that wait for their message to be sent.
export class Tray {
  constructor(node, changed) {
    this.node = node;
    this.changed = changed;
    this.urls = [];
  }

  add(url) {
    this.urls.push(url);
    this.draw();
  }

  // All of them, which then wait no longer.
  take() {
    const taken = this.urls;
    this.urls = [];
    this.draw();
    return taken;
  }

  draw() {
    this.node.replaceChildren(...this.urls.map((url, i) => {
      const label = `Remove picture ${i + 1}`;
      const remove = element("button", { type: "button", "aria-label": label, title: label }, "\u00d7");
      remove.onclick = () => {
        this.urls.splice(i, 1);
        this.draw();
      };
      return element("span", { class: "picture" }, thumbnail(url, i), remove);
    }));
    this.node.hidden = this.urls.length === 0;
    this.changed();
  }
}
