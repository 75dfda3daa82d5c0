// Writes a chat's request as a program: a curl command, or Python with the openai client.
const INLINE = 16384; // characters of a picture's data URL that is written out; a larger picture is read from its file

/** Returns the program. In `messages`, the URL of a picture is the picture {url, name}. */
export function program(kind, messages, options, base) {
  const isCurl = kind === "curl";
  let hasFiles = false;
  // The shell expands $, ` and \ in the text before END, so these are escaped. Reading files is its only command.
  const json = value => (isCurl ? JSON.stringify(value).replace(/[\\$`]/g, "\\$&") : JSON.stringify(value));
  const source = ({url, name}) => {
    if (url.length <= INLINE) return json(url);
    hasFiles = true;
    const prefix = url.slice(0, url.indexOf(",") + 1);
    const quoted = `'${name.replaceAll("'", "'\\''")}'`;
    return isCurl ? `"${prefix}$(base64 < ${quoted} | tr -d '\\n')"` : `"${prefix}" + read(${json(name)})`;
  };
  const part = ({text, image_url}) => (image_url
    ? `{"type": "image_url", "image_url": {"url": ${source(image_url.url)}}}`
    : `{"type": "text", "text": ${json(text)}}`);
  const message = ({role, content}) => `    {"role": "${role}", "content": ` +
    `${typeof content === "string" ? json(content) : `[\n        ${content.map(part).join(",\n        ")}]`}}`;
  const list = messages.map(message).join(",\n");
  const fields = Object.entries(options).filter(([, value]) => value !== undefined);
  if (isCurl) {
    return `curl ${base}/chat/completions -H "Authorization: Bearer $LLAVA_JAX_API_KEY" \\\n` +
      `  -H "Content-Type: application/json" -d @- <<END\n` +
      `{${fields.map(([name, value]) => `"${name}": ${json(value)}, `).join("")}"messages": [\n${list}\n]}\nEND\n`;
  }
  const [imports, read] = hasFiles ? ["import base64\n", "def read(path):\n    with open(path, \"rb\") as file:\n" +
    "        return base64.b64encode(file.read()).decode()\n\n\n"] : ["", ""];
  return `${imports}import os\n\nfrom openai import OpenAI\n\n${read && "\n"}${read}` +
    `client = OpenAI(base_url="${base}", api_key=os.environ.get("LLAVA_JAX_API_KEY") or "none")\n` +
    `messages = [\n${list}\n]\nanswer = client.chat.completions.create(\n    messages=messages` +
    `${fields.map(([name, value]) => `, ${name}=${json(value)}`).join("")})\n` +
    "print(answer.choices[0].message.content)\n";
}
