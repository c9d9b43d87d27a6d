// Renders the mathematics that pymdownx.arithmatex has marked.
document$.subscribe(({ body }) => {
  if (typeof renderMathInElement === "undefined") return;
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  });
});
