// Markdown to DOM nodes, as it is being written. Nothing is ever parsed as HTML: text goes into text
// nodes, and a link's address must be http, https or mailto. Images become links.
//
// A text is a row of blocks: paragraph, heading, rule, fence, quote, table, list item. Only the last
// block can still change, so it alone is drawn again; a block is settled once a whole line has come
// that belongs to the next one.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])( *\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +)(?=\S)/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MOST_NESTED = 12;

export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export class Markdown {
  constructor(root) {
    this.root = root;
    this.source = ""; // from the start of the last block on
    this.drawn = []; // nodes of that block
  }

  append(text) {
    this.source += text;
    const lines = this.source.split("\n");
    const blocks = blocksOf(lines);
    let settled = blocks.length - 1;
    // The last line may still grow into something else: it settles nothing.
    if (settled > 0 && blocks[settled].start === lines.length - 1) settled -= 1;
    if (settled > 0) {
      this.clear();
      for (const block of blocks.slice(0, settled)) draw(this.root, block, 0);
      this.source = lines.slice(blocks[settled].start).join("\n");
    }
    const open = blocks.slice(Math.max(settled, 0));
    if (open.length === 1 && this.drawn[0]?.code && this.drawn[0].language === open[0].language) {
      this.drawn[0].code.data = open[0].text; // a long listing: its text node is kept
    } else {
      this.clear();
      this.drawn = open.map((block) => draw(this.root, block, 0));
    }
  }

  clear() {
    for (const node of this.drawn) {
      const parent = node.parentNode;
      node.remove();
      if (parent !== this.root && !parent.childNodes.length) parent.remove(); // its list
    }
    this.drawn = [];
  }
}

function blocksOf(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const block = blockAt(lines, i);
    block.start = i;
    blocks.push(block);
    i = block.end;
  }
  return blocks;
}

function blockAt(lines, start) {
  const line = lines[start];
  let match = FENCE.exec(line);
  if (match) return fenceAt(lines, start, match);
  match = HEADING.exec(line);
  if (match) return { kind: "heading", level: match[1].length, text: match[2].trimEnd().replace(/ #+$/, ""), end: start + 1 };
  if (RULE.test(line)) return { kind: "rule", end: start + 1 };
  if (QUOTE.test(line)) {
    const end = endWhere(lines, start, (next) => !QUOTE.test(next));
    const inner = lines.slice(start, end).map((one) => one.replace(QUOTE, ""));
    return { kind: "quote", lines: inner, end };
  }
  match = ITEM.exec(line);
  if (match) return itemAt(lines, start, match);
  if (line.includes("|") && isTableRule(lines[start + 1] ?? "")) {
    const end = endWhere(lines, start + 1, (next) => !next.includes("|"));
    return { kind: "table", lines: lines.slice(start, end), end };
  }
  const end = endWhere(lines, start, startsBlock);
  return { kind: "paragraph", text: lines.slice(start, end).join("\n"), end };
}

const isTableRule = (line) => line.length < 1000 && line.includes("|") && TABLE_RULE.test(line);

const startsBlock = (line) =>
  !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function endWhere(lines, start, isPast) {
  let end = start + 1;
  while (end < lines.length && !isPast(lines[end])) end += 1;
  return end;
}

function fenceAt(lines, start, [, marks, language]) {
  const isClosing = (line) => {
    const word = line.trim();
    return word.length >= marks.length && word === marks[0].repeat(word.length);
  };
  const end = endWhere(lines, start, isClosing);
  const text = lines.slice(start + 1, end).join("\n");
  return { kind: "fence", language, text, end: Math.min(end + 1, lines.length) };
}

function itemAt(lines, start, [whole, , marker]) {
  const width = whole.length;
  const isInside = (line) => line.length - line.trimStart().length >= Math.min(width, 2);
  let end = start + 1;
  while (end < lines.length) {
    if (lines[end].trim() ? isInside(lines[end]) || (lines[end - 1].trim() && !startsBlock(lines[end])) : true) end += 1;
    else break;
  }
  const rest = lines.slice(start + 1, end).map((line) => line.slice(Math.min(width, line.length - line.trimStart().length)));
  const number = parseInt(marker, 10);
  const tag = Number.isNaN(number) ? "ul" : "ol";
  return { kind: "item", tag, number, lines: [lines[start].slice(width), ...rest], end };
}

// Adds a block to `parent` and returns its node.
function draw(parent, block, depth) {
  if (block.kind === "item") return drawItem(parent, block, depth);
  const node = DRAWN[block.kind](block, depth);
  parent.append(node);
  return node;
}

const DRAWN = {
  paragraph: (block) => inline(element("p"), block.text),
  heading: (block) => inline(element(`h${Math.min(block.level + 2, 6)}`), block.text),
  rule: () => element("hr"),
  quote: (block, depth) => drawLines(element("blockquote"), block.lines, depth + 1),
  fence: drawFence,
  table: drawTable,
};

function drawLines(node, lines, depth) {
  if (depth > MOST_NESTED) node.append(lines.join("\n"));
  else for (const block of blocksOf(lines)) draw(node, block, depth);
  return node;
}

function drawItem(parent, block, depth) {
  let list = parent.lastElementChild;
  if (list?.localName !== block.tag) {
    list = element(block.tag, block.tag === "ol" && block.number !== 1 ? { start: block.number } : {});
    parent.append(list);
  }
  const item = element("li");
  list.append(item);
  return drawLines(item, block.lines, depth + 1);
}

function drawFence(block) {
  const text = document.createTextNode(block.text);
  const code = element("pre", { tabindex: "0" }, element("code", {}, text));
  const copy = element("button", { type: "button", class: "copy", "data-copy": "code" }, "Copy");
  const head = element("figcaption", {}, block.language || "text", copy);
  const figure = element("figure", { class: "code" }, head, code);
  Object.assign(figure, { code: text, language: block.language });
  return figure;
}

function drawTable(block) {
  const [head, rule, ...rows] = block.lines.map(cellsOf);
  const aligned = (tag, cells) =>
    element("tr", {}, ...head.map((_, i) => {
      const mark = rule[i] ?? "";
      const side = mark.endsWith(":") ? (mark.startsWith(":") ? "middle" : "right") : "left";
      return inline(element(tag, { class: side }), cells[i] ?? "");
    }));
  const body = element("tbody", {}, ...rows.map((cells) => aligned("td", cells)));
  const table = element("table", {}, element("thead", {}, aligned("th", head)), body);
  return element("div", { class: "table", tabindex: "0" }, table);
}

const cellsOf = (line) =>
  line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

// Adds `text` with its emphasis, code and links to `node`, and returns `node`. Each kind of mark is
// searched for once beyond its last place, so that a row of unclosed ones costs no more than its length.
function inline(node, text, depth = 0) {
  const missing = new Set();
  const closing = (mark, from) => {
    if (missing.has(mark)) return -1;
    const at = text.indexOf(mark, from);
    if (at < 0) missing.add(mark);
    return at;
  };
  let done = 0;
  let i = 0;
  const put = (child, length) => {
    if (i > done) node.append(text.slice(done, i));
    node.append(child);
    i += length;
    done = i;
  };
  while (i < text.length) {
    const found = SPECIAL.has(text[i]) && depth < MOST_NESTED && spanAt(text, i, closing, depth);
    if (found) put(...found);
    else i += 1;
  }
  if (done < text.length) node.append(text.slice(done));
  return node;
}

const SPECIAL = new Set("\\`*_~[!h\n");
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const LINK = /!?\[((?:[^[\]\n\\]|\\.){0,1000})\]\(<?([^\s()<>]{1,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500})?)>?(?: "[^"\n]{0,500}")?\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*]{1,2000}[^\s<>"'`*.,;:!?)\]]/y;

// What begins at `i`, as [node, its length in the text]; nothing where it is plain text.
function spanAt(text, i, closing, depth) {
  const char = text[i];
  if (char === "\n") return [element("br"), 1];
  if (char === "\\") return /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? [text[i + 1], 2] : null;
  if (char === "`") return codeAt(text, i, closing);
  if (char === "[" || char === "!") return linkAt(text, i, depth);
  if (char === "h") return /\w/.test(text[i - 1] ?? "") ? null : addressAt(text, i);
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, i)) continue;
    const from = i + mark.length;
    if (!/\S/.test(text[from] ?? "") || (char === "_" && /\w/.test(text[i - 1] ?? ""))) continue;
    const end = closing(mark, from + 1);
    if (end < 0 || /\s/.test(text[end - 1]) || (char === "_" && /\w/.test(text[end + mark.length] ?? ""))) continue;
    // The inner star of ** is no end of *.
    if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) continue;
    return [inline(element(tag), text.slice(from, end), depth + 1), end + mark.length - i];
  }
  return null;
}

function codeAt(text, i, closing) {
  let width = 1;
  while (text[i + width] === "`") width += 1;
  const mark = "`".repeat(width);
  const end = closing(mark, i + width);
  if (end < 0) return [mark, width];
  const code = text.slice(i + width, end);
  const isPadded = code.trim() && code.startsWith(" ") && code.endsWith(" ");
  return [element("code", {}, isPadded ? code.slice(1, -1) : code), end + width - i];
}

function linkAt(text, i, depth) {
  LINK.lastIndex = i;
  const match = LINK.exec(text);
  if (!match || !isSafe(match[2])) return null;
  return [inline(anchor(match[2]), match[1] || match[2], depth + 1), match[0].length];
}

function addressAt(text, i) {
  ADDRESS.lastIndex = i;
  const match = ADDRESS.exec(text);
  return match && [anchor(match[0], match[0]), match[0].length];
}

const isSafe = (address) => /^(https?:\/\/|mailto:)/i.test(address);

const anchor = (href, ...children) =>
  element("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
