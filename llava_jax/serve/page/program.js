// Writes a chat's request as a program: a curl command or Python with the openai client.
const INLINE = 16384; // characters of a picture's data URL that is written out; a larger one is read from its file

/** Returns the program. `messages(url)` returns the request's messages, with `url(image)` as each image's URL. */
export function program(kind, messages, options, base) {
  const mark = `file-${Math.random().toString(36).slice(2)}-`;
  const files = [];
  const url = image => (image.url.length <= INLINE ? image.url : mark + (files.push(image) - 1));
  const insert = (text, read) => text.replace(new RegExp(`"${mark}(\\d+)"`, "g"), (_, number) => read(files[number]));
  const prefix = image => image.url.slice(0, image.url.indexOf(",") + 1);
  const list = messages(url);
  if (kind === "curl") {
    const quote = name => `'${name.replaceAll("'", "'\\''")}'`;
    // The shell expands $, ` and \ in the text between the ENDs, so these are escaped. Pictures are the only commands.
    const json = JSON.stringify({...options, messages: list}, null, 2).replace(/[\\$`]/g, "\\$&");
    const body = insert(json, image => `"${prefix(image)}$(base64 < ${quote(image.name)} | tr -d '\\n')"`);
    return `curl ${base}/chat/completions \\\n  -H "Authorization: Bearer $LLAVA_JAX_API_KEY" \\\n` +
      `  -H "Content-Type: application/json" -d @- <<END\n${body}\nEND\n`;
  }
  const text = insert(JSON.stringify(list, null, 4),
    image => `${JSON.stringify(prefix(image))} + read(${JSON.stringify(image.name)})`);
  const fields = Object.entries(options).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`).join("");
  const read = "\ndef read(path):\n    with open(path, \"rb\") as file:\n" +
    "        return base64.b64encode(file.read()).decode()\n\n\n";
  return `${files.length ? "import base64\n" : ""}import os\n\nfrom openai import OpenAI\n\n${files.length ? read : ""}` +
    `client = OpenAI(base_url="${base}", api_key=os.environ.get("LLAVA_JAX_API_KEY") or "none")\n` +
    `answer = client.chat.completions.create(\n${fields}    messages=${text.replaceAll("\n", "\n    ")},\n)\n` +
    "print(answer.choices[0].message.content)\n";
}
