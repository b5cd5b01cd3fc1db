-- Every ending: the log's last event, the state, the answer and the callback that is now owed, in one step.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 deadlines zset
-- ARGV  1 id, 2 epoch (0: a pending session that nobody came for), 3 seq of the ending, 4 ending state, 5 and 6 the ending's log
--       entry (name, value), 7 answer, 8 outcome, 9 seconds to keep what is owed
-- gives {'ended', ending id} | {'missing'} | {'fenced'} | {'short', last id in the log}
-- Atomic: an ending without its callback is a workflow that hangs, a callback without its ending may be sent twice. The
-- ending comes last: while the log lacks an event before it, nothing is written ('short'). Idempotent by epoch.
local s = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'ending_id')
local state, epoch = s[1], s[2]
if not state then
  redis.call('ZREM', KEYS[4], ARGV[1])
  return { 'missing' }
end
if epoch ~= ARGV[2] and not (ENDED[state] and ARGV[2] == '0') then
  return { 'fenced' }
end
if ENDED[state] then
  return { 'ended', s[3] }
end
local now = now_ms()
local ending_id
if state == 'pending' then
  local deadline = redis.call('ZSCORE', KEYS[4], ARGV[1])
  if deadline and tonumber(deadline) > now then
    return { 'fenced' }
  end
  ending_id = '1-0'
else
  local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
  local last_id = last[1] and last[1][1] or ''
  if last_id ~= epoch .. '-' .. (tonumber(ARGV[3]) - 1) then
    return { 'short', last_id }
  end
  ending_id = epoch .. '-' .. ARGV[3]
end
redis.call('XADD', KEYS[2], ending_id, ARGV[5], ARGV[6])
redis.call('HSET', KEYS[1], 'state', ARGV[4], 'ending_id', ending_id, 'ended_at', now, 'outcome', ARGV[8],
  'callback', 'owed', 'attempt', 0)
redis.call('HSET', KEYS[3], 'answer', ARGV[7])
redis.call('ZADD', KEYS[4], now, ARGV[1])
for i = 1, 3 do
  redis.call('EXPIRE', KEYS[i], ARGV[9])
end
return { 'ended', ending_id }
