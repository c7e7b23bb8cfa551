// @ts-check
// Builds nodes. Text only ever enters as text nodes and attributes, never as markup: names of runs and layers are hostile.

const SVG = 'http://www.w3.org/2000/svg';

function fill(node, props, children) {
  for (const [key, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (key === 'on') {
      for (const [type, listener] of Object.entries(value)) node.addEventListener(type, listener);
    } else if (key === 'style') {
      for (const [name, text] of Object.entries(value)) if (text !== null) node.style.setProperty(name, text);
    } else {
      node.setAttribute(key, value === true ? '' : String(value));
    }
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

/** HTML element with attributes, listeners (`on`), style properties and children (nodes or strings). */
export function h(tag, props, ...children) {
  return fill(document.createElement(tag), props, children);
}

/** SVG element. */
export function svg(tag, props, ...children) {
  return fill(document.createElementNS(SVG, tag), props, children);
}

/** A labelled <select>; `options` are [value, label] or {label, options} groups. */
export function select(label, onChange) {
  const input = h('select', { on: { change: () => onChange(input.value) } });
  const caption = h('span', {}, label);
  const element = h('label', { class: 'field' }, caption, input);
  let shown = '';
  return {
    element,
    input,
    set(options, value) {
      const key = JSON.stringify(options);
      if (key !== shown) {
        shown = key;
        input.replaceChildren(
          ...options.map((option) =>
            Array.isArray(option)
              ? h('option', { value: option[0] }, option[1])
              : h('optgroup', { label: option.label }, ...option.options.map(([v, text]) => h('option', { value: v }, text))),
          ),
        );
      }
      input.value = value;
    },
    show(visible, text = label) {
      element.hidden = !visible;
      caption.textContent = text;
    },
  };
}

/** A row of buttons of which one is pressed. */
export function segmented(label, options, onChange) {
  const buttons = options.map(([value, text]) =>
    h('button', { type: 'button', 'data-value': value, on: { click: () => onChange(value) } }, text),
  );
  const element = h('div', { class: 'segmented', role: 'group', 'aria-label': label }, ...buttons);
  return {
    element,
    set(value) {
      for (const button of buttons) button.setAttribute('aria-pressed', String(button.dataset.value === value));
    },
  };
}

export function button(text, onClick, props) {
  return h('button', { type: 'button', class: 'button', on: { click: onClick }, ...props }, text);
}
