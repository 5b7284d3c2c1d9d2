// Sphinx fetches the pages that a search has found, to quote them. Browsers fetch nothing from a disk, so the texts of
// all pages lie in a script beside this one, and what would be fetched is the name of the page.
{
  const script = document.createElement("script");
  script.src = new URL("texts.js", document.currentScript.src);
  const loaded = new Promise((resolve) => script.addEventListener("load", resolve));
  document.head.append(script);

  globalThis.fetch = async (address) => {
    await loaded;
    return { text: () => address.replace(/^\.\/|\.html$/g, "") };
  };

  // From the section on that was found, or from the beginning. Copies of files have no text here.
  Search.htmlToText = (name, anchor) => {
    const sections = globalThis.RESA_TEXTS[name] ?? [];
    const first = Math.max(0, sections.findIndex(([id]) => anchor === `#${id}`));
    return sections.slice(first).map(([, text]) => text).join(" ") || "A file of the repository.";
  };
}
